"""Prints torch's version, library folder, ABI, CUDA support and include folders for CMake."""

import torch
from torch.utils import cpp_extension

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
    raise SystemExit(f"torch {torch.__version__} is too old")
paths = [
    torch.__version__,
    cpp_extension.TORCH_LIB_PATH,
    str(int(torch.compiled_with_cxx11_abi())),
    "ON" if torch.version.cuda else "OFF",
    *cpp_extension.include_paths(),
]
print(";".join(paths))
