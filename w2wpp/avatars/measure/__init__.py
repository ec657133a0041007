"""How everything is scored in the miniature world."""
