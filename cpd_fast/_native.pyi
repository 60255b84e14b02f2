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
def resized_kl(
    dtype: int,
    student: int,
    teacher: int,
    weight: int,
    grad: int,
    loss: int,
    dstudent: int,
    n: int,
    c: int,
    student_h: int,
    student_w: int,
    teacher_h: int,
    teacher_w: int,
    over_classes: bool,
    align_corners: bool,
    inv_temperature: float,
    loss_scale: float,
    grad_scale: float,
    num_threads: int,
) -> None: ...
def rademacher(numbers: list[int], seed: int, probe: int, add: bool, alpha: float, num_threads: int) -> None: ...
def reversible_step(
    numbers: list[int], seed: int, probe: int, step: float, back: bool, lost: int, is_away: int, num_threads: int
) -> None: ...
def small_elements(x: int, numel: int, step: float, most: int) -> list[int]: ...
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
def elements(move: int, pointers: tuple[int, ...], sizes: tuple[int, ...], num_threads: int) -> None: ...
def masked_groups(pointers: list[int], table: int, numbers: list[int], num_threads: int) -> None: ...
def masked_groups_input(pointers: list[int], table: int, numbers: list[int], num_threads: int) -> None: ...
def masked_groups_weight(pointers: list[int], table: int, numbers: list[int], num_threads: int) -> None: ...

# Only where has_cuda:
def channel_kl_cuda(
    dtype: int,
    student: int,
    teacher: int,
    grad: int,
    loss: int,
    dstudent: int,
    scratch: int,
    outer: int,
    reduce: int,
    inner: int,
    inv_temperature: float,
    loss_scale: float,
    grad_scale: float,
    stream: int,
) -> None: ...
def channel_kl_cuda_scratch(dtype: int, outer: int, reduce: int, inner: int) -> int: ...
def scale_rows_cuda(dtype: int, grad: int, dstudent: int, outer: int, reduce: int, inner: int, stream: int) -> None: ...
def resized_kl_cuda(
    dtype: int,
    student: int,
    teacher: int,
    weight: int,
    grad: int,
    loss: int,
    dstudent: int,
    scratch: int,
    n: int,
    c: int,
    student_h: int,
    student_w: int,
    teacher_h: int,
    teacher_w: int,
    over_classes: bool,
    align_corners: bool,
    inv_temperature: float,
    loss_scale: float,
    grad_scale: float,
    stream: int,
) -> None: ...
def resized_kl_cuda_scratch(
    dtype: int, n: int, c: int, student_h: int, student_w: int, teacher_h: int, teacher_w: int, over_classes: bool
) -> int: ...
def rademacher_cuda(numbers: list[int], seed: int, probe: int, add: bool, alpha: float, stream: int) -> None: ...
def hutchinson_reduce_cuda(
    table: list[int],
    data: list[int],
    has_signs: bool,
    seed: int,
    probe: int,
    alpha: float,
    out: int,
    is_double: bool,
    bad: int,
    stream: int,
) -> None: ...
def channel_sums_cuda(
    channel_starts: int,
    cell_ids: int,
    cell_starts: int,
    index: int,
    num_channels: int,
    x: int,
    scale: int,
    out: int,
    is_double: bool,
    stream: int,
) -> None: ...
def masked_groups_cuda(pointers: list[int], table: int, numbers: list[int], stream: int) -> None: ...
def masked_groups_input_cuda(pointers: list[int], table: int, numbers: list[int], stream: int) -> None: ...
def masked_groups_weight_cuda(
    pointers: list[int], table: int, numbers: list[int], scratch: int, stream: int
) -> None: ...
def masked_groups_weight_cuda_scratch(numbers: list[int]) -> int: ...
