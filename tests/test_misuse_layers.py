"""Layers, drop-ins and functions over whole models refuse bad input by an error that names it, as the operator does."""

import pytest
import torch
from test_misuse import refused

import fused_lora
from fused_lora import convert, parametrize, tasks
from fused_lora.compat import loralib, torchtune
from fused_lora.dropout import check_p

CONFIG = fused_lora.LoRAConfig(target_modules=["q"])
# Every public function that takes a module, called with its argument.
TAKE_A_MODULE = {
    "apply_lora": lambda m: fused_lora.apply_lora(m, CONFIG),
    "remove_lora": fused_lora.remove_lora,
    "merge_lora": fused_lora.merge_lora,
    "lora_layers": fused_lora.lora_layers,
    "lora_parameters": fused_lora.lora_parameters,
    "count_parameters": fused_lora.count_parameters,
    "lora_report": fused_lora.lora_report,
    "save_adapter": lambda m: fused_lora.save_adapter(m, "absent"),
    "patch_peft": fused_lora.patch_peft,
    "unpatch_peft": fused_lora.unpatch_peft,
    "peft_status": fused_lora.peft_status,
    "lora_parametrize": parametrize.lora_parametrize,
    "lora_unparametrize": parametrize.lora_unparametrize,
    "set_lora_enabled": lambda m: parametrize.set_lora_enabled(m, True),
    "tasks.Model": tasks.Model,
    "load_loralib": lambda m: convert.load_loralib(m, {}, lora_alpha=1),
    "load_torchtune": lambda m: convert.load_torchtune(m, {}, lora_alpha=1),
    "to_loralib": lambda m: convert.to_loralib(m, lora_alpha=1),
    "to_torchtune": lambda m: convert.to_torchtune(m, lora_alpha=1),
    "loralib.mark_only_lora_as_trainable": loralib.mark_only_lora_as_trainable,
    "loralib.lora_state_dict": loralib.lora_state_dict,
    "torchtune.get_adapter_params": torchtune.get_adapter_params,
    "torchtune.set_trainable_params": lambda m: torchtune.set_trainable_params(m, []),
    "torchtune.disable_adapter": lambda m: torchtune.disable_adapter(m).__enter__(),
    "torchtune.fuse": torchtune.fuse,
    "from_linear": fused_lora.LoRALinear.from_linear,
    "from_embedding": fused_lora.LoRAEmbedding.from_embedding,
    "from_conv": fused_lora.LoRAConv2d.from_conv,
}


@pytest.mark.parametrize("name", list(TAKE_A_MODULE))
def test_a_string_for_a_module(name):
    with pytest.raises(TypeError, match=r"(an nn\..*|Conv1D), got str"):
        TAKE_A_MODULE[name]("x")


def test_adapters_of_a_string(tmp_path):
    pytest.importorskip("safetensors")
    model = fused_lora.apply_lora(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}), CONFIG)
    fused_lora.save_adapter(model, tmp_path)
    for function in (fused_lora.load_adapter, lambda m, folder: fused_lora.check_adapter(folder, m)):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str: pass the module itself"):
            function("x", tmp_path)


@pytest.mark.parametrize("p", ["x", "0.5", None, 0.5j])
def test_check_p_of_no_number(p):
    with pytest.raises(TypeError, match=rf"dropout_p must be a number, got {type(p).__name__} "):
        check_p(p)
    with pytest.raises(TypeError, match="lora_dropout must be a number"):
        fused_lora.LoRALinear(4, 4, lora_dropout=p)


def test_check_p_takes_any_number():
    assert [check_p(p) for p in (0, 1, False, torch.tensor(0.5), 0.25)] == [0.0, 1.0, 0.0, 0.5, 0.25]
    with pytest.raises(ValueError, match="must be in"):
        check_p(10**400)


LAYERS = {
    "linear": (fused_lora.LoRALinear, (4, 4)),
    "embedding": (fused_lora.LoRAEmbedding, (4, 4)),
    "convolution": (fused_lora.LoRAConv1d, (4, 4, 3)),
}


@pytest.mark.parametrize("kind", list(LAYERS))
class TestLayers:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float32"], ids=str)
    def test_dtype(self, kind, dtype):
        layer, sizes = LAYERS[kind]
        message = rf"dtype must be one of torch\.float64, torch\.float32, .* got '?{dtype}"
        refused(TypeError, lambda: layer(*sizes, dtype=dtype), {}, message)
        refused(TypeError, lambda: layer(*sizes, adapter_dtype=dtype), {}, f"adapter_{message}")

    def test_scale_alpha_and_switch(self, kind):
        layer, sizes = LAYERS[kind]
        layer = layer(*sizes, r=2, lora_alpha=4)
        for value in ("x", "1", None, [1.0], 1j):
            with pytest.raises(TypeError, match=rf"scale must be a number, got {type(value).__name__} "):
                layer.set_scale(value)
            with pytest.raises(TypeError, match=rf"lora_alpha must be a number, got {type(value).__name__} "):
                layer.set_alpha(value)
        for function in (layer.set_scale, layer.set_alpha):
            with pytest.raises(ValueError, match="must be finite, got"):
                function(-(10**400))
        for value in ("no", "True", None, 2, [True]):
            with pytest.raises(TypeError, match=rf"enabled must be True or False, got {type(value).__name__} "):
                layer.enabled = value
        assert (layer.scale, layer.lora_alpha, layer.enabled) == (2.0, 4, True)
        layer.enabled = 0
        assert layer.enabled is False


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_from_linear_of_another_dtype(dtype):
    with pytest.raises(TypeError, match=f"the dtype of the Linear's weight must be one of .* got {dtype}"):
        fused_lora.LoRALinear.from_linear(torch.nn.Linear(4, 4).to(dtype))


def test_parametrizations():
    with pytest.raises(TypeError, match="enabled must be True or False, got str 'no'"):
        parametrize.set_lora_enabled(torch.nn.Linear(4, 4), "no")
    with pytest.raises(TypeError, match="weight must be a tensor, got str"):
        parametrize.LoRAParametrization("x")
    with pytest.raises(ValueError, match=r"LoRA needs a floating weight of two or more dimensions, got torch\.float8"):
        parametrize.LoRAParametrization(torch.zeros(4, 4).to(torch.float8_e4m3fn))


# Drop-ins by their rank and the name it has in the message.
DROP_INS = {
    "torchtune": (lambda r, alpha=1.0: torchtune.LoRALinear(4, 4, r, alpha), "rank", "alpha"),
    "torchtune merging": (lambda r, alpha=1.0: torchtune.get_merged_lora_ckpt({}, r, alpha), "rank", "alpha"),
    "loralib.Linear": (lambda r, alpha=1.0: loralib.Linear(4, 4, r, alpha), "r", "lora_alpha"),
    "loralib.MergedLinear": (
        lambda r, alpha=1.0: loralib.MergedLinear(4, 4, r, alpha, enable_lora=[True]),
        "r",
        "lora_alpha",
    ),
    "loralib.Embedding": (lambda r, alpha=1.0: loralib.Embedding(4, 4, r, alpha), "r", "lora_alpha"),
    "loralib.Conv2d": (lambda r, alpha=1.0: loralib.Conv2d(4, 4, 3, r, alpha), "r", "lora_alpha"),
}


@pytest.mark.parametrize("name", list(DROP_INS))
def test_settings_of_drop_ins(name):
    make, rank, alpha = DROP_INS[name]
    for value in ("2", 2.0, None, True):
        with pytest.raises(TypeError, match=rf"^{rank} must be an int, got {type(value).__name__} "):
            make(value)
    with pytest.raises(ValueError, match=rf"^{rank} must be at least [01].*, got -1"):
        make(-1)
    with pytest.raises(TypeError, match=rf"^{alpha} must be a number, got str '2'"):
        make(2, "2")
    with pytest.raises(ValueError, match=rf"^{alpha} must be finite, got nan"):
        make(2, float("nan"))


NO_LISTS = [
    3,
    None,
    True,
    "ab",
    ["x"],
    {True: 1},
    {0: True},
    [True, 2],
    [True, None],
    [1, 0],
    range(2),
    torch.tensor(True),
]


@pytest.mark.parametrize("value", NO_LISTS, ids=str)
def test_enable_lora_of_no_bools(value):
    """loralib fails on most of these in words of its own, and reads [1, 0] as indices of groups."""
    message = rf" must be a list with True or False for each group of rows.*, got {type(value).__name__} "
    with pytest.raises(TypeError, match=f"^enable_lora{message}"):
        loralib.MergedLinear(4, 6, r=2, enable_lora=value)
    net, state = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 6)}), loralib.MergedLinear(4, 6, r=2, enable_lora=[True])
    factors = {f"q.{name}": t for name, t in state.state_dict().items() if "lora_" in name}
    with pytest.raises(TypeError, match=rf"^enable_lora\['q'\]{message}"):
        convert.load_loralib(net, factors, lora_alpha=1, enable_lora={"q": value})


def test_enable_lora_of_bools():
    """Whatever loralib computes with."""
    numpy = pytest.importorskip("numpy")
    wanted = [True, False, True]
    for value in (wanted, tuple(wanted), torch.tensor(wanted), numpy.array(wanted), list(numpy.array(wanted))):
        layer = loralib.MergedLinear(4, 6, r=2, enable_lora=value)
        assert (layer.enable_lora is value, layer.lora_A.shape, layer.lora_B.shape) == (True, (4, 4), (4, 2))
        assert layer.lora_ind.tolist() == [True] * 2 + [False] * 2 + [True] * 2
        assert layer(torch.ones(1, 4)).shape == (1, 6)


@pytest.mark.parametrize("value", [3, True, "q", ["q"], [True]], ids=str)
def test_enable_lora_by_no_path(value):
    net = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})
    with pytest.raises(TypeError, match=rf"^enable_lora must be a mapping from .*, got {type(value).__name__} "):
        convert.load_loralib(net, {}, lora_alpha=1, enable_lora=value)
    with pytest.raises(TypeError, match=r"^enable_lora must have the paths of layers as keys, got int 0"):
        convert.load_loralib(net, {}, lora_alpha=1, enable_lora={0: [True]})


@pytest.mark.parametrize("p", [None, [], (), "", {}], ids=repr)
def test_a_dropout_that_is_false_and_no_number(p):
    for make in (
        lambda: loralib.Linear(4, 4, 2, lora_dropout=p),
        lambda: loralib.MergedLinear(4, 4, 2, lora_dropout=p, enable_lora=[True]),
        lambda: loralib.Conv2d(4, 4, 3, 2, lora_dropout=p),
        lambda: loralib.Linear(4, 4, 0, lora_dropout=p),
    ):
        with pytest.raises(TypeError, match=rf"^lora_dropout must be a number, got {type(p).__name__} "):
            make()


@pytest.mark.parametrize("value", [None, 1, "weight", [torch.ones(1)]], ids=str)
def test_state_dicts_of_another_type(value):
    for function in (lambda state: torchtune.get_merged_lora_ckpt(state, 1, 1), torchtune.get_adapter_state_dict):
        with pytest.raises(TypeError, match=rf"^state_dict must be a dict of tensors, got {type(value).__name__}: "):
            function(value)


def test_a_merge_with_another_rank_than_the_factors():
    """alpha / rank would be another scale, in silence. All layers are named and none is merged."""
    state = torch.nn.ModuleDict(
        {name: torchtune.LoRALinear(4, 4, r, 8.0) for name, r in {"q": 2, "k": 4, "v": 3}.items()}
    ).state_dict()
    before = dict(state)
    with pytest.raises(
        ValueError, match=r"rank=4 is not that of q\.lora_a\.weight \(2, 4\) .*; v\.lora_a\.weight \(3, 4\)"
    ):
        torchtune.get_merged_lora_ckpt(state, 4, 8.0)
    assert state.keys() == before.keys()
    assert all(state[key] is before[key] for key in before)
    mixed = torchtune.LoRALinear(4, 4, 2, 8.0).state_dict() | {"lora_b.weight": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=r"rank=2 is not that of lora_a\.weight \(2, 4\) and lora_b\.weight \(4, 3\)"):
        torchtune.get_merged_lora_ckpt(mixed, 2, 8.0)
    assert len(mixed) == 3


@pytest.mark.parametrize(
    "layer",
    [torchtune.LoRALinear(4, 4, 2, 1.0), loralib.Linear(4, 4, 2), loralib.MergedLinear(4, 4, 2, enable_lora=[True])],
    ids=["torchtune", "loralib", "merged"],
)
def test_x_of_another_width(layer):
    """nn.Linear's is a RuntimeError; docs/drop-ins.md says that this one is not."""
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^x of shape \(3, 5\) does not fit weight of shape \(4, 4\)"):
        layer(torch.ones(3, 5))


def test_a_refused_merge_leaves_the_state_dict_alone():
    layer = torch.nn.ModuleDict({"q": torchtune.LoRALinear(4, 4, 2, 4.0)})
    state = layer.state_dict()
    before = dict(state)
    for rank, alpha in (("2", 4.0), (0, 4.0), (2, "4")):
        with pytest.raises((TypeError, ValueError), match=r"(rank|alpha) must be"):
            torchtune.get_merged_lora_ckpt(state, rank, alpha)
        assert state.keys() == before.keys()
        assert all(state[key] is before[key] for key in before)


@pytest.mark.parametrize("convertor", [convert.to_loralib, convert.to_torchtune])
def test_converters_take_numbers(convertor):
    model = fused_lora.apply_lora(torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)}), CONFIG)
    with pytest.raises(TypeError, match="lora_alpha must be a number, got str '16'"):
        convertor(model, lora_alpha="16")


@pytest.mark.parametrize("bias", [4, 1, "no", None])
def test_a_rank_in_the_place_of_the_bias_is_named(bias):
    """torchtune's layer and many a hand-written one take the rank third."""
    rank = f"; the rank is a keyword: r={bias}" if isinstance(bias, int) else "$"
    with pytest.raises(TypeError, match=rf"bias must be True or False, got .*{bias}.?{rank}"):
        fused_lora.LoRALinear(64, 64, bias)
    with pytest.raises(TypeError, match="bias must be True or False"):
        fused_lora.LoRAConv2d(3, 4, 1, bias=bias)
