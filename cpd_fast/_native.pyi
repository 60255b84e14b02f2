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
def rademacher(numbers: list[int], seed: int, probe: int, add: bool, alpha: float, num_threads: int) -> None: ...
def hutchinson_reduce(
    entries: int,
    num_entries: int,
    data: list[int],
    has_signs: bool,
    seed: int,
    probe: int,
    alpha: float,
    out: int,
    is_double: bool,
    bad: int,
    num_threads: int,
) -> None: ...
def channel_sums(
    channel_starts: int,
    cell_ids: int,
    cell_starts: int,
    index: int,
    num_channels: int,
    x: int,
    scale: int,
    out: int,
    is_double: bool,
    num_threads: int,
) -> None: ...
def masked_depthwise(
    dtype: int,
    input: int,
    weight: int,
    bias: int,
    output: int,
    lists: tuple[list[int], list[int], list[int]],
    sizes: list[int],
    num_threads: int,
) -> None: ...
def masked_depthwise_input(
    dtype: int,
    doutput: int,
    weight: int,
    dinput: int,
    lists: tuple[list[int], list[int], list[int]],
    sizes: list[int],
    num_threads: int,
) -> None: ...
def masked_depthwise_weight(
    dtype: int,
    doutput: int,
    input: int,
    dweight: int,
    dbias: int,
    lists: tuple[list[int], list[int], list[int]],
    sizes: list[int],
    num_threads: int,
) -> None: ...
