"""Child processes of the tests start with this: see torchvision_ops."""

import torchvision_ops

torchvision_ops.install()
