"""What every floor needs: token lists, walks over modules, dtypes by name, messages, files, seeds, the git state."""

from dinov3.utils.dtype import as_torch_dtype
from dinov3.utils.environment import fix_random_seeds, get_conda_env, get_sha
from dinov3.utils.messages import did_you_mean, refuse_unknown_arguments
from dinov3.utils.modules import count_parameters, has_batchnorms, named_apply, named_replace
from dinov3.utils.tensors import cat_keep_shapes, default_device, uncat_with_shapes

__all__ = [
    "as_torch_dtype",
    "cat_keep_shapes",
    "count_parameters",
    "default_device",
    "did_you_mean",
    "fix_random_seeds",
    "get_conda_env",
    "get_sha",
    "has_batchnorms",
    "named_apply",
    "named_replace",
    "refuse_unknown_arguments",
    "uncat_with_shapes",
]
