"""Tests against a real ComfyUI server on the CPU; without one they are skipped."""
