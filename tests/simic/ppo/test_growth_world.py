"""With real observations, legality and commands, a policy germinates where it helps, prunes what harms, else waits."""

import numpy as np
import torch

from esper.leyline.commands import Command
from esper.leyline.legality import why_illegal
from esper.leyline.observation import Observation
from esper.leyline.stages import Op, Stage
from esper.simic.ppo.evaluate import play
from esper.simic.ppo.seeds import Purpose, make_seed
from esper.simic.ppo.train import Plan, Training
from esper.tamiyo.policy.network import GrowthAgent
from tests.support.growth_world import BAD, GOOD, HARM, HELP, PRICE, TICKS, GrowthWorld, play_script
from tests.support.policies import config_of


def prune(seen: Observation) -> Command | None:
    view = seen.slots[1]
    return Command(slot=BAD, op=Op.PRUNE, reason="harms") if view.stage is Stage.HOLDING else None


def best(seen: Observation) -> Command | None:
    """Germinates where it helps, prunes what harms while that is built, then takes the seed through its stages."""
    view = seen.slots[0]
    if view.stage is Stage.EMPTY and not view.staged:
        return Command(slot=GOOD, op=Op.GERMINATE, blueprint="light", ticks=0, reason="helps")
    if (command := prune(seen)) is not None:
        return command
    if view.stage in (Stage.GERMINATED, Stage.TRAINING) and why_illegal(seen, view, Op.ADVANCE) is None:
        return Command(slot=GOOD, op=Op.ADVANCE, reason="on")
    return None


def test_the_world_pays_what_it_says() -> None:
    env = GrowthWorld(2)
    assert np.allclose(play_script(lambda seen: None, env), -TICKS * HARM)
    assert np.allclose(play_script(prune, env), 0)
    assert np.allclose(play_script(best, env), BEST)


BEST = (TICKS - 3) * HELP - HARM - PRICE  # three ticks until the helpful seed is blended, one until the other is gone


def test_a_policy_grows_what_helps_prunes_what_harms_and_waits_else() -> None:
    torch.manual_seed(make_seed(1, Purpose.WEIGHTS))
    agent = GrowthAgent(width=16, hidden=0)
    settings = {"ticks": TICKS, "gamma": 1.0, "lr": 1e-2, "minibatches": 2, "entropy": 0.2, "entropy_end": 0.0}
    training = Training(agent, GrowthWorld(16), config_of(**settings), Plan(updates=30, seed=1))
    at_random = play(agent, GrowthWorld(16), episodes=2, seed=7, greedy=False).flatten()
    numbers: list[dict[str, float]] = []
    training.run(after_update=lambda update: numbers.append(update.numbers))
    judged = GrowthWorld(16)
    learned = play(agent, judged, episodes=2, seed=7, greedy=False).flatten()
    kl = np.array([each["losses/approx_kl"] for each in numbers])
    assert kl.max() > 1e-3
    assert max(each["losses/mismatch"] for each in numbers) < 1e-5
    error = (at_random.var(ddof=1) / len(at_random) + learned.var(ddof=1) / len(learned)) ** 0.5
    assert learned.mean() > at_random.mean() + 2 * error
    assert learned.mean() > -TICKS * HARM + 2 * error  # never grow
    assert learned.mean() > 2 * error  # prune, and grow nothing
    assert judged.births[GOOD] > 2 * judged.births[BAD]
    assert judged.prunes[BAD] > 2 * judged.prunes[GOOD]
    print(f"random {at_random.mean():.2f}, learned {learned.mean():.2f} +- {error:.2f}, best {BEST:.2f}")
