"""Training convolutional nets without batch statistics: Deep Control and Mean Shift Rejection for PyTorch."""

from pathlib import Path as _Path
from pkgutil import extend_path as _extend_path

# In a checkout the subpackage triton_kernels lies beside this folder and the compiled extension may be in an installed
# copy that the checkout shadows; both are found through the package's path.
__path__ = _extend_path(__path__, __name__)
if (_Path(__file__).parents[1] / "triton_kernels").is_dir() and not (
    _Path(__file__).parent / "triton_kernels"
).is_dir():
    __path__.append(str(_Path(__file__).parents[1]))

from . import backends, functional, init, mean_shift, reference
from ._version import __version__
from .calibrate import calibrate_gain_
from .conversion import replace_conv_bn
from .mean_shift import MeanShiftRejection, project_kernel_gradients_, spatial_kernels, unity_decay
from .modules import (
    DeepControl1d,
    DeepControl2d,
    DeepControl3d,
    DeepControlConv1d,
    DeepControlConv2d,
    DeepControlConv3d,
    MapNoise,
    MeanShiftConv1d,
    MeanShiftConv2d,
    MeanShiftConv3d,
)
from .plain import to_reference

__all__ = [
    "DeepControl1d",
    "DeepControl2d",
    "DeepControl3d",
    "DeepControlConv1d",
    "DeepControlConv2d",
    "DeepControlConv3d",
    "MapNoise",
    "MeanShiftConv1d",
    "MeanShiftConv2d",
    "MeanShiftConv3d",
    "MeanShiftRejection",
    "__version__",
    "backends",
    "calibrate_gain_",
    "functional",
    "init",
    "mean_shift",
    "project_kernel_gradients_",
    "reference",
    "replace_conv_bn",
    "spatial_kernels",
    "to_reference",
    "unity_decay",
]
