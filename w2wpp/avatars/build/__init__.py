"""How the miniature world is made, stage by stage."""
