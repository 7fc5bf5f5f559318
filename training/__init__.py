"""How the built-in model is made: the drawn world, the training runs and the export."""
