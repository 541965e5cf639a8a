"""The planner: a pure function from facts to a frozen plan that explains itself, on chips that are not here."""

import pickle
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lora import plan
from fused_lora.plan import PIECES, DeviceFacts, Facts, device_facts, make_plan, parse_request, plan_for

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
UNREACHABLE = "the tensors are on the CPU"


def device(**replaced) -> DeviceFacts:
    facts = DeviceFacts(
        type="cuda", name="a GPU", capability=(9, 0), num_sms=132, native=FLOATS, triton_reason="", interpreted=False
    )
    return replace(facts, **replaced)


CHIPS = {
    "sm_80": device(name="NVIDIA A100", capability=(8, 0), num_sms=108),
    "sm_86": device(name="NVIDIA RTX 3090", capability=(8, 6), num_sms=82),
    "sm_90": device(name="NVIDIA H200", capability=(9, 0), num_sms=132),
    "sm_100": device(name="NVIDIA B200", capability=(10, 0), num_sms=148),
    "a chip of tomorrow": device(name="NVIDIA Z9000", capability=(17, 3), num_sms=500),
    "a chip with one processor": device(name="small", capability=(9, 0), num_sms=1),
    "ROCm": device(name="AMD Instinct MI300X", capability=(0, 0), num_sms=304, hip=True),
    "interpreter": device(type="cpu", name="cpu", num_sms=16, native=FLOATS - {torch.bfloat16}, interpreted=True),
}
CPU = device(
    type="cpu",
    name="cpu",
    capability=(0, 0),
    num_sms=1,
    native=frozenset({torch.float64, torch.float32}),
    triton_reason=UNREACHABLE,
)


def facts(
    chip=CHIPS["sm_90"], M=8192, N=4096, K=4096, R=16, dtype=torch.bfloat16, adapters=None, dropout=False
) -> Facts:
    return Facts(M, N, K, R, dtype, adapters or dtype, dropout, chip)


def forms(planned) -> dict[str, str]:
    return {piece: getattr(planned, piece) for piece in PIECES}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS.keys())
def test_a_plan_is_a_value(chip):
    first, second = make_plan(facts(chip), "triton"), make_plan(facts(chip), "triton")
    assert first == second
    assert hash(first) == hash(second)
    assert pickle.loads(pickle.dumps(first)) == first
    with pytest.raises(FrozenInstanceError):
        first.strategy = "torch"


def test_planning_asks_no_device(monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the planner asked the device")

    for name in ("get_device_properties", "get_device_capability", "current_device", "is_available", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, asked)
    monkeypatch.setattr(torch.cpu, "get_capabilities", asked, raising=False)
    for chip in (*CHIPS.values(), CPU):
        make_plan(facts(chip))


@pytest.mark.parametrize("name", [name for name in CHIPS if name not in ("interpreter", "ROCm")])
def test_every_nvidia_gpu_gets_the_kernels_and_the_vendors_gemm(name):
    """Until a committed measurement says otherwise: skinny pieces from kernels, the big products from the vendor."""
    chip = CHIPS[name]
    planned = make_plan(facts(chip))
    assert planned.strategy == "triton"
    assert forms(planned) == {piece: "beta1" if piece in ("expand", "grad_x") else "triton" for piece in PIECES}
    assert any("one kernel each reads x or dy once" in reason for reason in planned.reasons)
    for piece in ("expand", "grad_x"):
        assert any(reason.startswith(piece) and chip.name in reason for reason in planned.reasons)


def test_the_interpreter_is_only_for_those_who_ask():
    planned = make_plan(facts(CHIPS["interpreter"]))
    assert planned.strategy == "torch"
    assert planned.reasons[0] == "not triton: its interpreter is for tests; ask for strategy='triton' to use it"
    assert make_plan(facts(CHIPS["interpreter"]), "triton").strategy == "triton"


def test_amds_chips_get_the_kernels_only_for_those_who_ask():
    """The kernels were compiled for one of them and run on none."""
    planned = make_plan(facts(CHIPS["ROCm"]))
    assert planned.strategy == "torch"
    assert set(forms(planned).values()) == {"torch"}
    assert len(planned.reasons) == 1
    assert planned.reasons[0].startswith("not triton: the kernels compile for AMD's gfx942 but no run on an AMD chip")
    assert planned.reasons[0].endswith("ask for strategy='triton' to use them")
    asked = make_plan(facts(CHIPS["ROCm"]), "triton")
    assert (asked.strategy, asked.shrink, asked.expand) == ("triton", "triton", "beta1")


@pytest.mark.parametrize(
    ("given_facts", "reason"),
    [
        (facts(CPU), UNREACHABLE),
        (facts(dtype=torch.float64), "the kernels accumulate in float32 and would lower float64"),
        (facts(R=513), "the kernels take ranks up to 512, this one is 513"),
        (facts(device(triton_reason="triton is not installed")), "triton is not installed"),
    ],
)
def test_what_the_kernels_cannot_take_goes_to_torch_with_the_reason(given_facts, reason):
    planned = make_plan(given_facts)
    assert planned.strategy == "torch"
    assert set(forms(planned).values()) == {"torch"}
    assert f"not triton: {reason}" in planned.reasons
    with pytest.raises(ValueError, match=f"cannot run here: {reason}; use strategy=None or 'torch'"):
        make_plan(given_facts, "triton")


@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str))
def test_only_a_cpu_that_does_not_multiply_the_dtype_upcasts(dtype):
    planned = make_plan(facts(CPU, dtype=dtype))
    assert planned.upcast == (dtype in (torch.bfloat16, torch.float16))
    assert planned.upcast == any("float32 blocks and round once" in reason for reason in planned.reasons)
    assert not make_plan(facts(dtype=dtype)).upcast


@pytest.mark.parametrize("piece", PIECES)
def test_each_form_of_each_piece_can_be_forced(piece):
    known = ("torch", "beta1", "pointer", "descriptor") if piece in ("expand", "grad_x") else ("torch", "triton")
    usual = make_plan(facts())
    for form in known:
        planned = make_plan(facts(), f"triton:{piece}={form}")
        assert forms(planned) == forms(usual) | {piece: form}
        assert planned.reasons[0] == "strategy 'triton' was asked for"


def test_several_pieces_can_be_forced_at_once():
    planned = make_plan(facts(), "triton:expand=pointer,grad_a=torch,shrink=torch")
    assert (planned.expand, planned.grad_x, planned.grad_a, planned.shrink) == ("pointer", "beta1", "torch", "torch")


@pytest.mark.parametrize("request_", ["torch", "reference"])
def test_the_other_strategies_can_be_forced(request_):
    planned = make_plan(facts(), request_)
    assert planned.strategy == request_
    assert planned.reasons[0] == f"strategy {request_!r} was asked for"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("", "strategy must be None or one of torch, triton, reference, got ''"),
        ("Triton", "got 'Triton'"),
        ("triton:expand", "expand has no form ''; it has torch, beta1, pointer, descriptor"),
        ("triton:expand=triton", "expand has no form 'triton'"),
        ("triton:shrink=beta1", "shrink has no form 'beta1'; it has torch, triton"),
        ("triton:dx=torch", "cannot force 'dx=torch': only 'triton' takes forms, for the pieces shrink, expand"),
        ("torch:shrink=triton", "cannot force 'shrink=triton': only 'triton' takes forms"),
    ],
)
def test_a_request_nobody_can_meet_lists_what_there_is(request_, message):
    with pytest.raises(ValueError, match=message):
        parse_request(request_)
    with pytest.raises(ValueError, match=message):
        make_plan(facts(), request_)


@pytest.mark.parametrize(
    ("given_facts", "reason"),
    [
        (facts(CHIPS["sm_80"]), "NVIDIA A100 has no TMA"),
        (facts(CHIPS["ROCm"]), "AMD Instinct MI300X has no TMA"),
        (facts(dtype=torch.float32), "it is for 16-bit dtypes, not float32"),
        (facts(K=4095), "K = 4095 must be positive multiples of 8"),
        (facts(K=0), "K = 0 must be positive multiples of 8"),
    ],
)
def test_descriptors_are_refused_where_they_cannot_address(given_facts, reason):
    with pytest.raises(ValueError, match=f"expand=descriptor cannot run here: .*{reason}.*; use expand=pointer"):
        make_plan(given_facts, "triton:expand=descriptor")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    chip=st.sampled_from([*CHIPS.values(), CPU]),
    M=st.sampled_from([0, 1, 2, 63, 64, 65, 8192, 2**31]),
    N=st.sampled_from([0, 1, 7, 10, 4096, 128256]),
    K=st.sampled_from([0, 1, 7, 64, 4096, 14336]),
    R=st.integers(1, 512),
    dtype=st.sampled_from(sorted(FLOATS, key=str)),
    float_adapters=st.booleans(),
    dropout=st.booleans(),
)
def test_every_call_has_a_plan_with_a_reason_and_a_printable_form(chip, M, N, K, R, dtype, float_adapters, dropout):
    adapters = torch.float32 if float_adapters and dtype.itemsize == 2 else dtype
    given_facts = Facts(M, N, K, R, dtype, adapters, dropout, chip)
    planned = make_plan(given_facts)
    assert planned.facts == given_facts
    assert planned.reasons
    text = str(planned)
    assert f"fused-lora plan: {planned.strategy}" in text
    assert f"dropout {'on' if dropout else 'off'}" in text
    assert all(f"\n  {piece} " in text for piece in PIECES)
    assert all(f"because {reason}" in text for reason in planned.reasons)
    if planned.strategy == "triton":
        for request in ("triton:expand=pointer,grad_x=pointer", "triton:expand=torch,grad_x=torch"):
            make_plan(given_facts, request)


def test_a_plan_of_the_reference_has_no_pieces():
    assert not any(f"\n  {piece} " in str(make_plan(facts(), "reference")) for piece in PIECES)


def test_the_plan_of_a_call_is_made_once_and_follows_the_interpreter(monkeypatch):
    call = (4, 5, 6, 2, torch.float32, torch.float32, False, torch.device("cpu"), None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert plan_for(*call) is plan_for(*call)
    assert plan_for(*call).facts.device.interpreted
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not plan_for(*call).facts.device.interpreted
    assert UNREACHABLE in plan_for(*call).reasons[0]


class TestDeviceFacts:
    """What the devices are asked, on devices that are not here."""

    @pytest.fixture(autouse=True)
    def nothing_remembered(self):
        device_facts.cache_clear()
        yield
        device_facts.cache_clear()

    def gpu(self, monkeypatch, major, minor, hip=None):
        properties = SimpleNamespace(name="a GPU", multi_processor_count=40, major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        return device_facts(torch.device("cuda", 0), False)

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0), (17, 3)])
    def test_a_gpu_the_kernels_run_on(self, monkeypatch, capability):
        asked = self.gpu(monkeypatch, *capability)
        assert (asked.name, asked.capability, asked.num_sms, asked.triton_reason) == ("a GPU", capability, 40, "")
        assert asked.native == FLOATS

    def test_a_gpu_that_is_too_old(self, monkeypatch):
        asked = self.gpu(monkeypatch, 7, 5)
        assert asked.triton_reason == "the kernels need compute capability 8.0, a GPU has 7.5"

    def test_an_amd_gpu(self, monkeypatch):
        asked = self.gpu(monkeypatch, 9, 4, hip="6.4")
        assert (asked.capability, asked.triton_reason, asked.hip) == ((0, 0), "", True)

    def test_no_triton(self, monkeypatch):
        monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
        asked = self.gpu(monkeypatch, 9, 0)
        assert asked.triton_reason == "triton is not installed (pip install 'fused-lora[triton]')"

    def test_another_kind_of_device(self):
        asked = device_facts(torch.device("mps"), False)
        assert asked.triton_reason == "the kernels do not run on mps devices"

    @pytest.mark.parametrize("multiplies", [False, True])
    def test_a_cpu_multiplies_what_it_has_instructions_for(self, monkeypatch, multiplies):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies}, raising=False)
        assert (torch.bfloat16 in device_facts(torch.device("cpu"), False).native) == multiplies
        assert torch.float16 not in device_facts(torch.device("cpu"), False).native

    def test_the_device_is_asked_once(self, monkeypatch):
        first = self.gpu(monkeypatch, 9, 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", None)
        assert device_facts(torch.device("cuda", 0), False) is first
