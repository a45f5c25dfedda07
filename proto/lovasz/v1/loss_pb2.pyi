from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_INT16: _ClassVar[DataType]
    DATA_TYPE_INT32: _ClassVar[DataType]
    DATA_TYPE_INT64: _ClassVar[DataType]

class ClassSelection(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLASS_SELECTION_UNSPECIFIED: _ClassVar[ClassSelection]
    CLASS_SELECTION_PRESENT: _ClassVar[ClassSelection]
    CLASS_SELECTION_ALL: _ClassVar[ClassSelection]
    CLASS_SELECTION_LISTED: _ClassVar[ClassSelection]

class InputKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INPUT_KIND_UNSPECIFIED: _ClassVar[InputKind]
    INPUT_KIND_LOGITS: _ClassVar[InputKind]
    INPUT_KIND_PROBABILITIES: _ClassVar[InputKind]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_INT16: DataType
DATA_TYPE_INT32: DataType
DATA_TYPE_INT64: DataType
CLASS_SELECTION_UNSPECIFIED: ClassSelection
CLASS_SELECTION_PRESENT: ClassSelection
CLASS_SELECTION_ALL: ClassSelection
CLASS_SELECTION_LISTED: ClassSelection
INPUT_KIND_UNSPECIFIED: InputKind
INPUT_KIND_LOGITS: InputKind
INPUT_KIND_PROBABILITIES: InputKind

class TensorInfo(_message.Message):
    __slots__ = ("data_type", "shape")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class LovaszSoftmax(_message.Message):
    __slots__ = ("class_selection", "listed_classes", "class_weights", "per_image", "ignore_index", "input")
    CLASS_SELECTION_FIELD_NUMBER: _ClassVar[int]
    LISTED_CLASSES_FIELD_NUMBER: _ClassVar[int]
    CLASS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PER_IMAGE_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    INPUT_FIELD_NUMBER: _ClassVar[int]
    class_selection: ClassSelection
    listed_classes: _containers.RepeatedScalarFieldContainer[int]
    class_weights: _containers.RepeatedScalarFieldContainer[float]
    per_image: bool
    ignore_index: int
    input: InputKind
    def __init__(self, class_selection: _Optional[_Union[ClassSelection, str]] = ..., listed_classes: _Optional[_Iterable[int]] = ..., class_weights: _Optional[_Iterable[float]] = ..., per_image: bool = ..., ignore_index: _Optional[int] = ..., input: _Optional[_Union[InputKind, str]] = ...) -> None: ...

class LovaszHinge(_message.Message):
    __slots__ = ("per_image", "ignore_index", "multilabel")
    PER_IMAGE_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MULTILABEL_FIELD_NUMBER: _ClassVar[int]
    per_image: bool
    ignore_index: int
    multilabel: bool
    def __init__(self, per_image: bool = ..., ignore_index: _Optional[int] = ..., multilabel: bool = ...) -> None: ...

class CrossEntropy(_message.Message):
    __slots__ = ("class_weights", "ignore_index", "label_smoothing")
    CLASS_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    class_weights: _containers.RepeatedScalarFieldContainer[float]
    ignore_index: int
    label_smoothing: float
    def __init__(self, class_weights: _Optional[_Iterable[float]] = ..., ignore_index: _Optional[int] = ..., label_smoothing: _Optional[float] = ...) -> None: ...

class LovaszSigmoid(_message.Message):
    __slots__ = ("per_image", "ignore_index", "multilabel")
    PER_IMAGE_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MULTILABEL_FIELD_NUMBER: _ClassVar[int]
    per_image: bool
    ignore_index: int
    multilabel: bool
    def __init__(self, per_image: bool = ..., ignore_index: _Optional[int] = ..., multilabel: bool = ...) -> None: ...

class BinaryCrossEntropy(_message.Message):
    __slots__ = ("pos_weight", "ignore_index", "multilabel")
    POS_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    IGNORE_INDEX_FIELD_NUMBER: _ClassVar[int]
    MULTILABEL_FIELD_NUMBER: _ClassVar[int]
    pos_weight: _containers.RepeatedScalarFieldContainer[float]
    ignore_index: int
    multilabel: bool
    def __init__(self, pos_weight: _Optional[_Iterable[float]] = ..., ignore_index: _Optional[int] = ..., multilabel: bool = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("weight", "lovasz_softmax", "lovasz_hinge", "cross_entropy", "lovasz_sigmoid", "binary_cross_entropy")
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    LOVASZ_SOFTMAX_FIELD_NUMBER: _ClassVar[int]
    LOVASZ_HINGE_FIELD_NUMBER: _ClassVar[int]
    CROSS_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    LOVASZ_SIGMOID_FIELD_NUMBER: _ClassVar[int]
    BINARY_CROSS_ENTROPY_FIELD_NUMBER: _ClassVar[int]
    weight: float
    lovasz_softmax: LovaszSoftmax
    lovasz_hinge: LovaszHinge
    cross_entropy: CrossEntropy
    lovasz_sigmoid: LovaszSigmoid
    binary_cross_entropy: BinaryCrossEntropy
    def __init__(self, weight: _Optional[float] = ..., lovasz_softmax: _Optional[_Union[LovaszSoftmax, _Mapping]] = ..., lovasz_hinge: _Optional[_Union[LovaszHinge, _Mapping]] = ..., cross_entropy: _Optional[_Union[CrossEntropy, _Mapping]] = ..., lovasz_sigmoid: _Optional[_Union[LovaszSigmoid, _Mapping]] = ..., binary_cross_entropy: _Optional[_Union[BinaryCrossEntropy, _Mapping]] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("terms",)
    TERMS_FIELD_NUMBER: _ClassVar[int]
    terms: _containers.RepeatedCompositeFieldContainer[Term]
    def __init__(self, terms: _Optional[_Iterable[_Union[Term, _Mapping]]] = ...) -> None: ...

class RequestHeader(_message.Message):
    __slots__ = ("loss", "logits", "labels", "want_grad", "shared_tensors", "joint", "run", "offsets")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WANT_GRAD_FIELD_NUMBER: _ClassVar[int]
    SHARED_TENSORS_FIELD_NUMBER: _ClassVar[int]
    JOINT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    loss: Loss
    logits: TensorInfo
    labels: TensorInfo
    want_grad: bool
    shared_tensors: SharedTensors
    joint: Joint
    run: str
    offsets: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, loss: _Optional[_Union[Loss, _Mapping]] = ..., logits: _Optional[_Union[TensorInfo, _Mapping]] = ..., labels: _Optional[_Union[TensorInfo, _Mapping]] = ..., want_grad: bool = ..., shared_tensors: _Optional[_Union[SharedTensors, _Mapping]] = ..., joint: _Optional[_Union[Joint, _Mapping]] = ..., run: _Optional[str] = ..., offsets: _Optional[_Iterable[int]] = ...) -> None: ...

class Joint(_message.Message):
    __slots__ = ("run", "step", "rank", "world_size", "call", "round", "blocking", "process", "secret")
    RUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BLOCKING_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    run: str
    step: int
    rank: int
    world_size: int
    call: bytes
    round: int
    blocking: bool
    process: bytes
    secret: bytes
    def __init__(self, run: _Optional[str] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., call: _Optional[bytes] = ..., round: _Optional[int] = ..., blocking: bool = ..., process: _Optional[bytes] = ..., secret: _Optional[bytes] = ...) -> None: ...

class SharedTensors(_message.Message):
    __slots__ = ("session", "region", "logits_offset", "labels_offset", "grad_offset")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    LOGITS_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LABELS_OFFSET_FIELD_NUMBER: _ClassVar[int]
    GRAD_OFFSET_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    region: int
    logits_offset: int
    labels_offset: int
    grad_offset: int
    def __init__(self, session: _Optional[bytes] = ..., region: _Optional[int] = ..., logits_offset: _Optional[int] = ..., labels_offset: _Optional[int] = ..., grad_offset: _Optional[int] = ...) -> None: ...

class SharedMemoryRequest(_message.Message):
    __slots__ = ("region", "release", "call", "cancel", "device_memory")
    REGION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    region: int
    release: bool
    call: SharedMemoryCall
    cancel: int
    device_memory: DeviceMemory
    def __init__(self, region: _Optional[int] = ..., release: bool = ..., call: _Optional[_Union[SharedMemoryCall, _Mapping]] = ..., cancel: _Optional[int] = ..., device_memory: _Optional[_Union[DeviceMemory, _Mapping]] = ...) -> None: ...

class DeviceMemory(_message.Message):
    __slots__ = ("device", "nbytes")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    device: bytes
    nbytes: int
    def __init__(self, device: _Optional[bytes] = ..., nbytes: _Optional[int] = ...) -> None: ...

class SharedMemoryCall(_message.Message):
    __slots__ = ("number", "header", "timeout_seconds", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    number: int
    header: RequestHeader
    timeout_seconds: float
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, number: _Optional[int] = ..., header: _Optional[_Union[RequestHeader, _Mapping]] = ..., timeout_seconds: _Optional[float] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SharedMemoryAnswer(_message.Message):
    __slots__ = ("number", "header", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    header: ResponseHeader
    error: CallError
    def __init__(self, number: _Optional[int] = ..., header: _Optional[_Union[ResponseHeader, _Mapping]] = ..., error: _Optional[_Union[CallError, _Mapping]] = ...) -> None: ...

class CallError(_message.Message):
    __slots__ = ("code", "text", "retry_after_milliseconds")
    CODE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    code: str
    text: str
    retry_after_milliseconds: int
    def __init__(self, code: _Optional[str] = ..., text: _Optional[str] = ..., retry_after_milliseconds: _Optional[int] = ...) -> None: ...

class SharedMemoryReply(_message.Message):
    __slots__ = ("session", "error", "takes_calls", "answer", "devices")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TAKES_CALLS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    session: bytes
    error: str
    takes_calls: bool
    answer: SharedMemoryAnswer
    devices: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, session: _Optional[bytes] = ..., error: _Optional[str] = ..., takes_calls: bool = ..., answer: _Optional[_Union[SharedMemoryAnswer, _Mapping]] = ..., devices: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("header", "logits", "labels")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    logits: bytes
    labels: bytes
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., logits: _Optional[bytes] = ..., labels: _Optional[bytes] = ...) -> None: ...

class ComputeStreamRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: RequestHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[RequestHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class TermResult(_message.Message):
    __slots__ = ("loss", "per_class_loss", "per_image_loss")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    PER_CLASS_LOSS_FIELD_NUMBER: _ClassVar[int]
    PER_IMAGE_LOSS_FIELD_NUMBER: _ClassVar[int]
    loss: float
    per_class_loss: _containers.RepeatedScalarFieldContainer[float]
    per_image_loss: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, loss: _Optional[float] = ..., per_class_loss: _Optional[_Iterable[float]] = ..., per_image_loss: _Optional[_Iterable[float]] = ...) -> None: ...

class ServerTiming(_message.Message):
    __slots__ = ("receive_seconds", "queue_seconds", "compute_seconds", "batch_requests", "joint_wait_seconds", "copy_seconds")
    RECEIVE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    JOINT_WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COPY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    receive_seconds: float
    queue_seconds: float
    compute_seconds: float
    batch_requests: int
    joint_wait_seconds: float
    copy_seconds: float
    def __init__(self, receive_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., batch_requests: _Optional[int] = ..., joint_wait_seconds: _Optional[float] = ..., copy_seconds: _Optional[float] = ...) -> None: ...

class ResponseHeader(_message.Message):
    __slots__ = ("loss", "terms", "intersection", "union", "grad", "grad_scale", "timing", "ranks", "warning")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    INTERSECTION_FIELD_NUMBER: _ClassVar[int]
    UNION_FIELD_NUMBER: _ClassVar[int]
    GRAD_FIELD_NUMBER: _ClassVar[int]
    GRAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    loss: float
    terms: _containers.RepeatedCompositeFieldContainer[TermResult]
    intersection: _containers.RepeatedScalarFieldContainer[int]
    union: _containers.RepeatedScalarFieldContainer[int]
    grad: TensorInfo
    grad_scale: float
    timing: ServerTiming
    ranks: int
    warning: str
    def __init__(self, loss: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[TermResult, _Mapping]]] = ..., intersection: _Optional[_Iterable[int]] = ..., union: _Optional[_Iterable[int]] = ..., grad: _Optional[_Union[TensorInfo, _Mapping]] = ..., grad_scale: _Optional[float] = ..., timing: _Optional[_Union[ServerTiming, _Mapping]] = ..., ranks: _Optional[int] = ..., warning: _Optional[str] = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("header", "grad")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    GRAD_FIELD_NUMBER: _ClassVar[int]
    header: ResponseHeader
    grad: bytes
    def __init__(self, header: _Optional[_Union[ResponseHeader, _Mapping]] = ..., grad: _Optional[bytes] = ...) -> None: ...

class ComputeStreamResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: ResponseHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[ResponseHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class AbortStepRequest(_message.Message):
    __slots__ = ("joint", "want_grad", "reason")
    JOINT_FIELD_NUMBER: _ClassVar[int]
    WANT_GRAD_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    joint: Joint
    want_grad: bool
    reason: str
    def __init__(self, joint: _Optional[_Union[Joint, _Mapping]] = ..., want_grad: bool = ..., reason: _Optional[str] = ...) -> None: ...

class AbortStepResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveRunRequest(_message.Message):
    __slots__ = ("joint", "evaluation_step")
    JOINT_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_STEP_FIELD_NUMBER: _ClassVar[int]
    joint: Joint
    evaluation_step: int
    def __init__(self, joint: _Optional[_Union[Joint, _Mapping]] = ..., evaluation_step: _Optional[int] = ...) -> None: ...

class LeaveRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "hardware", "healthy", "starting")
    NAME_FIELD_NUMBER: _ClassVar[int]
    HARDWARE_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    STARTING_FIELD_NUMBER: _ClassVar[int]
    name: str
    hardware: str
    healthy: bool
    starting: bool
    def __init__(self, name: _Optional[str] = ..., hardware: _Optional[str] = ..., healthy: bool = ..., starting: bool = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "devices", "losses", "max_message_bytes", "memory_budget_bytes", "max_requests")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    version: str
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    losses: _containers.RepeatedScalarFieldContainer[str]
    max_message_bytes: int
    memory_budget_bytes: int
    max_requests: int
    def __init__(self, version: _Optional[str] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., losses: _Optional[_Iterable[str]] = ..., max_message_bytes: _Optional[int] = ..., memory_budget_bytes: _Optional[int] = ..., max_requests: _Optional[int] = ...) -> None: ...
