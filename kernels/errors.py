"""Named errors. Every error a user can cause derives from SparseSpecError and says what to do about it."""


class SparseSpecError(Exception):
    """Base of every named error of this project."""


class KernelInputError(SparseSpecError, ValueError):
    """A tensor or setting given to an op does not fit: wrong dtype, rank, size, stride or device."""


class KernelUnavailableError(SparseSpecError, RuntimeError):
    """The tensors live on a device whose kernels cannot run here."""


class TuningCacheWarning(UserWarning):
    """A file of measured tile sizes cannot be used; kernels take their default ones."""
