"""What an agent says while acting is what it says while learning, bit for bit, with resets and masks in between."""

import pytest
import torch
from torch import Tensor, nn

from esper.leyline.errors import EsperError
from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.heads import Batch, Chooser, Greedy, Recorded

T, N = 12, 5


class Gated(Agent):
    """A head, and a second one that matters for one option of the first."""

    def __init__(self, hidden: int) -> None:
        super().__init__(4, hidden)
        self.head, self.critic = nn.Linear(hidden or 4, 3), nn.Linear(hidden or 4, 1)

    def encode(self, observation: Batch) -> tuple[Tensor, None]:
        return observation["x"], None

    def choose(self, x: Tensor, context: None, observation: Batch, chooser: Chooser) -> None:
        op = chooser.pick("op", self.head(x), observation["mask"])
        chooser.pick("argument", 2 * self.head(x), torch.ones_like(observation["mask"]), op == 1)

    def evaluate(self, x: Tensor, context: None, observation: Batch) -> Tensor:
        return self.critic(x).squeeze(-1).float()


@pytest.mark.parametrize("hidden", [0, 8])
def test_judging_equals_acting(hidden: int) -> None:
    torch.manual_seed(3)
    agent = Gated(hidden)
    observation = {"x": torch.randn(T, N, 4), "mask": torch.rand(T, N, 3) > 0.4}
    observation["mask"][..., 0] = True
    starts = torch.rand(T, N) > 0.7
    generators = [torch.Generator().manual_seed(10 + env) for env in range(N)]
    first = torch.randn(N, 2 * hidden)
    state, taken = first, []
    for t in range(T):
        state = state * ~starts[t][:, None]
        taken.append(agent.act({k: v[t] for k, v in observation.items()}, state, generators=generators))
        state = taken[-1].state
    actions = {head: torch.stack([decision.actions[head] for decision in taken]) for head in ("op", "argument")}
    judged = agent(observation, first, starts, actions)
    assert torch.allclose(judged.log_prob, torch.stack([d.log_prob for d in taken]), atol=1e-6)
    assert torch.allclose(judged.value, torch.stack([d.value for d in taken]), atol=1e-6)
    assert bool((judged.log_prob.exp() < 1).any())
    off = ~judged.matters["argument"]
    assert bool(off.any())
    assert bool((judged.entropies["argument"][off] == 0).all())


def test_no_legal_option_is_an_error_that_names_the_head() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(EsperError, match=r"'op': no legal option in row \(1,\)"):
        Greedy().pick("op", torch.zeros(2, 2), mask)
    option = Greedy().pick("op", torch.zeros(2, 2), mask, torch.tensor([True, False]))  # matters in the first row only
    assert option.tolist() == [0, 0]


def test_a_changed_mask_is_noticed_when_judging() -> None:
    recorded = Recorded({"op": torch.tensor([1, 1])})
    with pytest.raises(EsperError, match="illegal under the mask"):
        recorded.pick("op", torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]))
