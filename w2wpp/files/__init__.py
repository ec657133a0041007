"""What files are: the container of our own, torch files of others, pictures, tables."""
