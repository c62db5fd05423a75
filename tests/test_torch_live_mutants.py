"""The nets under live modules have no hole: each mutant of the code turns the test beside it red."""

import pytest
from mutants import net

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch", reason="live modules are torch's: pip install 'loraformat[peers]'")

import test_torch_live as live  # noqa: E402

from loraformat_converters.torch_live import base, beside, factors, handle, merged, stack  # noqa: E402

CHECKS = {
    "linear": lambda folder: live.test_a_pair_beside_a_module_is_the_merged_module("linear"),
    "grouped": lambda folder: live.test_a_pair_beside_a_module_is_the_merged_module("conv2d grouped"),
    "embedding": lambda folder: live.test_a_pair_beside_a_module_is_the_merged_module("embedding"),
    "square": lambda folder: live.test_a_square_weight_lies_as_its_class_has_it(),
    "read": lambda folder: live.test_modules_that_are_read_and_not_called_get_a_changed_weight(True),
    "order": lambda folder: live.test_several_act_in_order_each_with_its_weight_and_its_switch(("branch", "branch")),
    "merged": lambda folder: live.test_several_act_in_order_each_with_its_weight_and_its_switch(("merge", "merge")),
    "tied": lambda folder: live.test_a_change_of_one_of_two_tied_modules_is_of_that_one("merge"),
    "tokens": lambda folder: live.test_trained_tokens_are_those_of_every_module_that_shares_the_tensor("branch"),
    "half": lambda folder: live.test_half_precision_is_computed_in_the_wider_of_both_and_rounded_once(),
    "overflow": lambda folder: live.test_a_weight_that_overflows_changes_nothing(),
}


def the_scale_lost(patch):
    patch.setattr(factors.UpdateModule, "scale", property(lambda self: self.strength))


def the_strength_lost(patch):
    patch.setattr(factors.UpdateModule, "scale", property(lambda self: self.parts[0].part.scale))


def one_group_for_all(patch):
    def wrong(module, x, a, b):
        kernel = a.reshape(a.shape[0], -1, *module.kernel_size)
        inner = module._conv_forward(x, torch.cat([kernel, 0 * kernel]), None)
        return torch.nn.functional.conv2d(inner, b.reshape(*b.shape, 1, 1), groups=module.groups)

    patch.setattr(beside, "_convolution", wrong)


def embedding_as_linear(patch):
    patch.setattr(beside, "_embedding", lambda module, ids, a, b: a.T[ids * 0] @ b.T)


def conv1d_as_linear(patch):
    patch.setattr(base, "is_conv1d", lambda module: False)


def attention_called(patch):
    patch.setattr(handle, "uncalled", lambda roots: frozenset())


def the_last_first(patch):
    def forward(self, weight):
        for update in reversed(self.updates):
            weight = update(weight)
        return weight

    patch.setattr(stack.Stack, "forward", forward)


def merged_in_place(patch):
    def in_place(at, tensor):
        with torch.no_grad():
            at.stored.copy_(tensor)

    patch.setattr(merged, "_set", in_place)


def tokens_of_one(patch):
    patch.setattr(base.ModuleBase, "_partners", lambda self, name: [])


def computed_in_the_narrower(patch):
    patch.setattr(torch, "promote_types", lambda one, other: torch.bfloat16)


def half_of_a_change(patch):
    def careless(self, acting, weight, enabled):
        self._acting, self._weight, self._enabled = acting, weight, enabled
        self._refresh()

    patch.setattr(handle.Handle, "_set", careless)


test_the_checks, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (the_scale_lost, "linear"),
        (the_strength_lost, "linear"),
        (one_group_for_all, "grouped"),
        (embedding_as_linear, "embedding"),
        (conv1d_as_linear, "square"),
        (attention_called, "read"),
        (the_last_first, "order"),
        (merged_in_place, "tied"),
        (tokens_of_one, "tokens"),
        (computed_in_the_narrower, "half"),
        (half_of_a_change, "overflow"),
    ],
)
