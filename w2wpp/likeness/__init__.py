"""How like photographs their paintings are, by any face embedder: an ONNX file, or embeddings as a table."""

from .embedder import Embedder, OnnxEmbedder
from .faces import Faces
from .score import score_likeness
from .table import Entry, read_entries

__all__ = ["Embedder", "Entry", "Faces", "OnnxEmbedder", "read_entries", "score_likeness"]
