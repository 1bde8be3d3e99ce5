"""dino.txt: the towers, and the model of images and texts."""
