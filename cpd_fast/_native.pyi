has_cuda: bool
cuda_archs: str

def supported_isas() -> list[str]: ...
def current_isa() -> str: ...
def set_isa(name: str) -> None: ...
def channel_kl(
    dtype: int,
    student: int,
    teacher: int,
    grad: int,
    loss: int,
    dstudent: int,
    outer: int,
    reduce: int,
    inner: int,
    inv_temperature: float,
    loss_scale: float,
    grad_scale: float,
    num_threads: int,
) -> None: ...
def scale_rows(dtype: int, grad: int, dstudent: int, outer: int, reduce: int, inner: int, num_threads: int) -> None: ...
