"""Import onnx2torch even where torchvision is missing, or was built for another torch.

onnx2torch imports torchvision for two operators of object detectors, NonMaxSuppression and RoiAlign, which no language
model has. Beside a CPU build of torch the registry's torchvision can't be imported at all, and transformers breaks
where it is installed all the same. So two empty modules stand in for it, only while onnx2torch is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import NoReturn

from stages.errors import UserError

_NAMES = ("torchvision", "torchvision.ops")


@cache
def import_onnx2torch() -> ModuleType:
    """Import the onnx2torch package.

    Raises:
        UserError: it isn't installed.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        # RuntimeError is what a torchvision of another torch build raises when it registers its operators.
        with _stand_in():
            return _import()
    return _import()


def _import() -> ModuleType:
    try:
        return importlib.import_module("onnx2torch")
    except ModuleNotFoundError as error:
        if error.name != "onnx2torch":
            raise
        raise UserError(
            "--algo signround and --refine turn decoder blocks into torch modules with onnx2torch, which isn't "
            "installed: pip install --no-deps onnx2torch==1.5.15"
        ) from error


@contextmanager
def _stand_in() -> Iterator[None]:
    broken = {name: sys.modules.pop(name) for name in _NAMES if name in sys.modules}
    package, ops = (ModuleType(name) for name in _NAMES)
    ops.__dict__.update(roi_align=_missing, nms=_missing, box_convert=_missing)
    package.__dict__.update(ops=ops)
    sys.modules.update(zip(_NAMES, (package, ops), strict=True))
    try:
        yield
    finally:
        for name in _NAMES:
            del sys.modules[name]
        sys.modules.update(broken)


def _missing(*_arguments: object) -> NoReturn:
    raise NotImplementedError("this operator needs a torchvision that fits the installed torch")
