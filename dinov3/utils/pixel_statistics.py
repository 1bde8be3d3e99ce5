"""Mean and standard deviation of the red, green and blue values in [0, 1] that published models were trained with.

They are not defined with the transforms, because those need torchvision.
"""

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
SAT_DEFAULT_MEAN = (0.430, 0.411, 0.296)
SAT_DEFAULT_STD = (0.213, 0.156, 0.143)
