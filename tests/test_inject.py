"""apply_lora, remove_lora, merge_lora and the report on a small network: ties, aliases, hooks, shortcuts, copies."""

import copy
import pickle

import pytest
import torch
from nets import IDS, assert_unchanged, config, make_net, snapshot, train
from torch import nn

from fused_lora import (
    LoRAConfig,
    LoRAConv2d,
    LoRAEmbedding,
    LoRALinear,
    apply_lora,
    count_parameters,
    lora_layers,
    lora_parameters,
    lora_report,
    merge_lora,
    remove_lora,
)


@pytest.fixture
def net():
    return make_net()


class TestApply:
    def test_replaces_freezes_and_starts_as_the_base(self, net):
        wanted, keys = net(IDS), set(net.state_dict())
        assert apply_lora(net, config()) is net
        kinds = {name: type(layer) for name, layer in lora_layers(net)}
        assert kinds["embed"] is LoRAEmbedding
        assert kinds["conv"] is LoRAConv2d
        assert {kinds[name] for name in ("blocks.0.up", "blocks.1.down", "head")} == {LoRALinear}
        assert torch.equal(net(IDS), wanted)
        train(net)(IDS).sum().backward()
        for name, p in net.named_parameters():
            factor = name.endswith(("lora_a", "lora_b"))
            assert p.requires_grad == factor, name
            assert (p.grad is not None) == factor, name
        assert keys < set(net.state_dict())
        assert {name.rpartition(".")[2] for name in set(net.state_dict()) - keys} == {"lora_a", "lora_b"}

    def test_ties_and_aliases_stay(self, net):
        weight = net.embed.weight
        apply_lora(net, config())
        assert net.embed.weight is net.head.weight is weight
        assert net.blocks[0].up is net.blocks[2].up
        assert net.alias is net.blocks[1].up
        assert len(list(lora_layers(net))) == 7

    def test_one_chosen_name_is_enough_one_excluded_name_too_much(self, net):
        apply_lora(net, config(["alias"]))
        assert net.blocks[1].up is net.alias
        assert isinstance(net.alias, LoRALinear)
        remove_lora(net)
        apply_lora(net, config(["up"], exclude_modules=["alias"]))
        assert not isinstance(net.alias, LoRALinear)
        assert [name for name, _ in lora_layers(net)] == ["blocks.0.up"]

    def test_ranks_scales_and_starts(self, net):
        patterns = {"rank_pattern": {"blocks.1.up": 4, "conv": 1}, "alpha_pattern": {"up": 16, "embed": 5}}
        apply_lora(net, config(use_rslora=True, init_lora_weights=False, lora_dropout=0.25, **patterns))
        layers = dict(lora_layers(net))
        found = {name: (layer.r, layer.scale) for name, layer in layers.items()}
        assert found["blocks.0.up"] == (2, 16 / 2**0.5)
        assert found["blocks.1.up"] == (4, 8.0)
        assert found["conv"] == (1, 3.0)
        assert found["embed"] == (2, 5 / 2**0.5)
        assert all(layer.lora_a.any() and layer.lora_b.any() for layer in layers.values())
        assert {name: layer.lora_dropout for name, layer in layers.items() if layer.lora_dropout != 0.25} == {
            "embed": 0.0
        }

    @pytest.mark.parametrize(
        ("bias", "trained"),
        [
            ("none", set()),
            ("lora_only", {"blocks.0.up.bias", "blocks.1.up.bias"}),
            ("all", {"blocks.0.up.bias", "blocks.1.up.bias", "conv.bias", "norm.bias"}),
        ],
    )
    def test_bias(self, net, bias, trained):
        apply_lora(net, config(["up", "down"], bias=bias))
        biases = {name for name, p in net.named_parameters() if name.endswith("bias") and p.requires_grad}
        assert biases == trained
        train(net)(IDS).sum().backward()
        assert {name for name, p in net.named_parameters() if name.endswith("bias") and p.grad is not None} == trained

    def test_adapter_dtype_and_training_mode(self, net):
        net.bfloat16().eval()
        apply_lora(net, config())
        assert {p.dtype for p in lora_parameters(net)} == {torch.float32}
        assert not any(module.training for module in net.modules())
        remove_lora(net)
        apply_lora(net, config(), adapter_dtype=torch.bfloat16)
        assert {p.dtype for p in lora_parameters(net)} == {torch.bfloat16}

    def test_all_linear(self, net):
        apply_lora(net, config("all-linear"))
        assert {name for name, _ in lora_layers(net)} == {
            "blocks.0.up",
            "blocks.0.down",
            "blocks.1.up",
            "blocks.1.down",
            "head",
        }
        remove_lora(net)
        net.get_output_embeddings = lambda: net.head
        apply_lora(net, config("all-linear"))
        assert "head" not in dict(lora_layers(net))

    def test_report_and_counts(self):
        net = nn.Sequential(nn.Linear(784, 1000), nn.Linear(1000, 2000), nn.Linear(2000, 10))
        assert count_parameters(net) == (2_807_010, 2_807_010, 0)
        apply_lora(net, LoRAConfig(r=1, target_modules="all-linear"))
        assert count_parameters(net) == (2_813_804, 6_794, 6_794)
        report = lora_report(net)
        assert report.rows[0] == (("0",), "LoRALinear", "Linear", 1, 8.0, 1784)
        assert str(report).splitlines() == [
            "module  layer       over    rank  scale  parameters",
            "0       LoRALinear  Linear     1      8       1,784",
            "1       LoRALinear  Linear     1      8       3,000",
            "2       LoRALinear  Linear     1      8       2,010",
            "3 LoRA layers; 2,813,804 parameters, 6,794 trainable (0.241 %), 6,794 of LoRA",
        ]

    def test_report_names_aliases(self, net):
        rows = lora_report(apply_lora(net, config())).rows
        assert ("blocks.1.up", "alias") in [row.names for row in rows]
        assert len(rows) == 7


class TestRemoveAndMerge:
    def test_remove_restores_everything(self, net):
        net.norm.requires_grad_(False)
        net.blocks[0].up.weight.requires_grad_(False)
        before, wanted = snapshot(net), net(IDS)
        apply_lora(net, config(bias="all"))
        train(net)
        assert not torch.equal(net(IDS), wanted)
        for _, layer in lora_layers(net):
            layer.merge()
        assert remove_lora(net) is net
        assert_unchanged(net, before)
        assert torch.equal(net(IDS), wanted)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_a_copy_can_be_removed_and_merged_on_its_own(self, net, clone):
        before, wanted = snapshot(net), net(IDS)
        train(apply_lora(net, config()))
        with_lora, twin, merged = net(IDS), clone(net), clone(net)
        remove_lora(net)
        assert_unchanged(net, before)
        assert torch.equal(twin(IDS), with_lora)
        assert torch.equal(remove_lora(twin)(IDS), wanted)
        assert twin.embed.weight is twin.head.weight
        assert twin.embed.weight is not net.embed.weight
        with pytest.warns(UserWarning, match="share one weight"):
            assert torch.allclose(merge_lora(merged)(IDS), with_lora, atol=1e-4)

    def test_merge(self, net):
        net.double()
        originals, keys, flags = dict(net.named_modules()), list(net.state_dict()), snapshot(net)[2]
        train(apply_lora(net, config(["up", "down", "conv"])))
        with_lora = net(IDS)
        assert merge_lora(net) is net
        assert not list(lora_layers(net))
        assert list(net.state_dict()) == keys
        assert all(module is originals[name] for name, module in net.named_modules())
        assert snapshot(net)[2] == flags
        assert torch.allclose(net(IDS), with_lora, rtol=1e-12, atol=1e-12)
        apply_lora(net, config())  # as good as new

    def test_merge_unties_and_says_so(self, net):
        head = net.head.weight.clone()
        train(apply_lora(net, config(["embed"])))
        merged = net.embed.to_base().weight
        with pytest.warns(UserWarning, match=r"embed\.weight and head\.weight share one weight; merging unties them"):
            merge_lora(net)
        assert torch.equal(net.head.weight, head)
        assert torch.equal(net.embed.weight, merged)
        assert net.embed.weight is not net.head.weight

    def test_merge_refuses_a_disabled_layer(self, net):
        train(apply_lora(net, config(["up", "down"])))
        net.alias.enabled = False
        wanted = net(IDS)
        with pytest.raises(ValueError, match=r"blocks\.1\.up is disabled: enable it, or use remove_lora"):
            merge_lora(net)
        assert len(list(lora_layers(net))) == 4
        assert torch.equal(net(IDS), wanted)

    def test_two_parts_with_their_own_configs(self, net):
        before = snapshot(net)
        apply_lora(net.blocks[0], config(["up"]))
        apply_lora(net.blocks[1], config(["down"], r=4))
        assert {name: layer.r for name, layer in lora_layers(net)} == {"blocks.0.up": 2, "blocks.1.down": 4}
        remove_lora(net)
        assert_unchanged(net, before)

    def test_layers_built_by_hand(self):
        linear = nn.Linear(8, 8)
        net = nn.Sequential(LoRALinear.from_linear(linear), nn.ReLU())
        remove_lora(net)
        assert type(net[0]) is nn.Linear
        assert net[0].weight is linear.weight

    def test_replaced_parameters_are_the_ones_given_back(self, net):
        # What sharding, moving to some devices, and load_state_dict(assign=True) do.
        apply_lora(net, config(["up"]))
        new = nn.Parameter(torch.ones(12, 8), requires_grad=False)
        net.alias.weight = new
        remove_lora(net)
        assert net.alias.weight is new

    def test_holds_no_second_reference_to_a_weight(self, net):
        up = net.alias
        apply_lora(net, config(["up"]))
        assert not list(up.parameters())
        with pytest.raises(TypeError):
            up(torch.randn(1, 8))  # a stray reference fails instead of leaving LoRA out

    @pytest.mark.parametrize("undo", [remove_lora, merge_lora])
    def test_without_lora(self, net, undo):
        with pytest.raises(ValueError, match="no LoRA layer inside this module; was apply_lora called on it"):
            undo(net)
        with pytest.raises(ValueError, match="it is one itself, use its to_base"):
            undo(LoRALinear(4, 4))


class TestSurroundings:
    def test_hooks_run_on_and_come_back(self, net):
        calls, late = [], []
        linear = net.blocks[0].up
        handles = [
            linear.register_forward_hook(lambda module, args, y: calls.append(("forward", type(module).__name__))),
            linear.register_forward_pre_hook(
                lambda module, args, kwargs: calls.append(("pre", kwargs)), with_kwargs=True
            ),
            linear.register_full_backward_hook(lambda module, dx, dy: calls.append(("backward", len(dy)))),
        ]
        apply_lora(net, config(["embed", "up", "down"]))
        net.blocks[0].up.register_forward_hook(lambda module, args, y: 2 * y)
        net.blocks[1].down.register_full_backward_hook(lambda module, dx, dy: late.append(type(module).__name__))
        one = ("pre", {}), ("forward", "LoRALinear")
        net(IDS).sum().backward()
        assert calls == [*one, *one, ("backward", 1), ("backward", 1)]
        handles[1].remove()
        handles[2].remove()
        calls.clear()
        doubled = net(IDS)
        remove_lora(net)
        assert torch.equal(net(IDS), doubled), "a hook added in between stays with the layer"
        assert calls == [one[1]] * 2 + [("forward", "Linear")] * 2
        net(IDS).sum().backward()
        assert late == ["LoRALinear", "Linear"]

    def test_transformer_encoder_takes_no_shortcut_past_lora(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        net = nn.TransformerEncoder(layer, 2).eval()
        x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
        padding[0, 3:] = True
        wanted, before = net(x, src_key_padding_mask=padding), snapshot(net)
        with pytest.raises(ValueError, match=r"NonDynamicallyQuantizableLinear.*exclude_modules=\['out_proj'\]"):
            apply_lora(net, config("all-linear"))
        apply_lora(net, config("all-linear", exclude_modules=["out_proj"]))
        with torch.no_grad():
            start = net(x, src_key_padding_mask=padding)
            assert torch.allclose(start[~padding], wanted[~padding], atol=1e-5)
            train(net)
            for mask in (padding, None):
                evaluated = net(x, src_key_padding_mask=mask)
                trained = net.train().requires_grad_(False)
                for module in net.modules():
                    if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
                        module.eval()
                assert torch.allclose(evaluated, trained(x, src_key_padding_mask=mask), atol=1e-5)
                net.eval()
                assert not torch.allclose(evaluated[~padding], wanted[~padding], atol=1e-2)
        remove_lora(net)
        assert_unchanged(net, before)
        assert torch.equal(net(x, src_key_padding_mask=padding), wanted)

    @pytest.mark.parametrize(
        ("layer", "x"),
        [
            (nn.Linear(3, 4), torch.ones(2, 3)),
            (nn.Embedding(5, 4), torch.tensor([1, 4])),
            (nn.Conv1d(3, 4, 2), torch.ones(2, 3, 5)),
        ],
        ids=["linear", "embedding", "conv"],
    )
    def test_a_layer_called_by_torchs_name_for_x(self, layer, x):
        net = apply_lora(nn.Sequential(copy.deepcopy(layer)), config(["0"], init_lora_weights=False))
        assert torch.equal(net[0](input=x), net[0](x))
        assert not torch.equal(net[0](input=x), layer(x))
        with pytest.raises(TypeError, match="needs x"):
            net[0]()

    def test_compiled_model(self, net):
        compiled = torch.compile(net, backend="eager")
        apply_lora(compiled, config(["up", "down"]))
        assert torch.equal(compiled(IDS), net(IDS))
        train(net)
        assert torch.equal(compiled(IDS), net(IDS))
        remove_lora(compiled)
        assert not list(lora_layers(net))
        assert all(p.requires_grad for p in net.parameters())

    def test_steps_move_only_the_factors(self, net):
        before = {name: t.clone() for name, t in net.state_dict().items()}
        train(apply_lora(net, config()))
        optimizer = torch.optim.SGD(lora_parameters(net), lr=0.1)
        net(IDS).square().sum().backward()
        optimizer.step()
        assert all(torch.equal(net.state_dict()[name], t) for name, t in before.items())
        remove_lora(net).load_state_dict(before)
