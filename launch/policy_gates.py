"""Learning gates: problems with a known answer that the learner must solve, for several seeds each.

    python launch/policy_gates.py [--gates recall luby ...] [--seeds N] [--json FILE]

Prints one line a run and a table at the end; the exit code is 1 if a gate is missed. With ``--json`` runs that the file
has already are not made again, so the command can be stopped and typed anew. The figures are in docs/policy.md.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import trim_mean

from esper.leyline.files import write_json
from esper.simic.ppo.config import PPOConfig
from esper.simic.ppo.evaluate import play
from esper.simic.ppo.seeds import Purpose, make_seed
from esper.simic.ppo.train import Plan, Training
from esper.simic.probes import make_probe, make_probe_agent

ENVS, EPISODES = 16, 4


@dataclass(frozen=True, slots=True)
class Gate:
    """A problem and what must come out.

    Fields:
        env: name of a probe.
        steps: environment steps of the training.
        hidden: width of the core; 0: without memory.
        seeds: number of seeds.
        wanted: by measure (iqm, mean, min over seeds), at least this; negative limits of controls under ``at_most``.
        at_most: the same, at most this.
        settings: of `PPOConfig`, besides the defaults.
    """

    env: str
    steps: int
    hidden: int
    seeds: int
    wanted: dict[str, float] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


_CART = {"gamma": 0.99, "epochs": 8}
_RECALL = {"gamma": 0.99, "lr": 2.5e-3, "entropy": 0.02, "entropy_end": 0.02}
# 32 is right at one step of 64, so it must still be tried when all else is known: entropy that falls, from far above
_LUBY = {"gamma": 0.9, "lr": 2.5e-3, "epochs": 8, "entropy": 0.05, "entropy_end": 0.0}
GATES = {
    "cartpole_hidden": Gate("cartpole_hidden", 150_000, 64, 5, {"iqm": 430, "min": 300}, settings=_CART),
    "cartpole_hidden without memory": Gate("cartpole_hidden", 150_000, 0, 3, at_most={"mean": 80}, settings=_CART),
    "cartpole": Gate("cartpole", 150_000, 0, 3, {"min": 475}, settings=_CART),
    "recall": Gate("recall", 102_400, 64, 5, {"min": 0.95}, settings=_RECALL),
    "recall without memory": Gate("recall", 102_400, 0, 3, at_most={"mean": 0.4}, settings=_RECALL),
    "luby": Gate("luby", 153_600, 0, 5, {"min": 0.95}, settings=_LUBY),
    "sigmoid": Gate("sigmoid", 204_800, 0, 5, {"min": 0.95}, settings={"gamma": 0.5, "lr": 2.5e-3, "epochs": 8}),
    "identity": Gate("identity", 40_960, 0, 5, {"min": 9.8}, settings={"gamma": 0.0, "lr": 2.5e-3}),
    "gated": Gate("gated", 40_960, 0, 5, {"min": 2.0}, settings={"gamma": 0.9, "lr": 2.5e-3}),
}


def score(gate: Gate, agent: Any, seed: int, *, greedy: bool) -> float:
    """Mean return of the policy; of `luby` the share of hits, of `sigmoid` the share of the best return, of `gated` the
    best episode, because some are cut off."""
    env = make_probe(gate.env, ENVS)
    if gate.env == "sigmoid":
        best = 0.0

        class Noting(type(env)):  # type: ignore[misc]
            def advance(self, actions: Any) -> Any:
                nonlocal best
                best += float(self.best().sum())
                return super().advance(actions)

        env = Noting(ENVS)
        totals = play(agent, env, episodes=EPISODES, seed=seed, greedy=greedy)
        return float(totals.sum() / best)
    totals = play(agent, env, episodes=EPISODES, seed=seed, greedy=greedy)
    if gate.env == "gated":
        return float(totals.max() if totals.min() >= 0 else totals.min())
    return float(1 + totals.mean() / 64) if gate.env == "luby" else float(totals.mean())


def run(gate: Gate, seed: int) -> dict[str, float]:
    """Trains with one seed; returns greedy and sampled score, and seconds."""
    torch.manual_seed(make_seed(seed, Purpose.WEIGHTS))
    env, config = make_probe(gate.env, ENVS), PPOConfig(**gate.settings)
    agent = make_probe_agent(env, hidden=gate.hidden)
    begun = time.perf_counter()
    Training(agent, env, config, Plan(updates=gate.steps // (ENVS * config.ticks), seed=seed)).run()
    seconds = time.perf_counter() - begun
    scores = {"greedy": score(gate, agent, seed, greedy=True), "sampled": score(gate, agent, seed, greedy=False)}
    return scores | {"seconds": seconds}


def judge(gate: Gate, scores: list[float]) -> tuple[dict[str, float], bool]:
    """Returns the measures over seeds, and whether the gate is passed."""
    measures = {"iqm": float(trim_mean(scores, 0.25)), "mean": float(np.mean(scores)), "min": float(min(scores))}
    passed = all(measures[name] >= limit for name, limit in gate.wanted.items())
    return measures, passed and all(measures[name] <= limit for name, limit in gate.at_most.items())


def main() -> int:
    """Runs the gates that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gates", nargs="+", choices=list(GATES), default=list(GATES))
    parser.add_argument("--seeds", type=int, help="of each gate, instead of its own number")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    done: dict[str, dict[str, float]] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    lines, missed = [], False
    for name in given.gates:
        gate, scores = GATES[name], []
        for seed in range(given.seeds or gate.seeds):
            key = f"{name}/{seed}"
            if key not in done:
                done[key] = run(gate, seed)
                if given.json:
                    write_json(given.json, done)
            result = done[key]
            texts = (f"{kind} {value:.3f}" for kind, value in result.items())
            print(f"{name}, seed {seed}: {', '.join(texts)}", flush=True)
            scores.append(result["greedy"])
        measures, passed = judge(gate, scores)
        missed = missed or not passed
        limits = [f"{k} >= {v:g}" for k, v in gate.wanted.items()] + [f"{k} <= {v:g}" for k, v in gate.at_most.items()]
        cells = [f"{value:.3f}" for value in measures.values()]
        lines.append(
            f"| {name} | {gate.steps:,} | {len(scores)} | {' | '.join(cells)} | {', '.join(limits)} | {passed} |"
        )
    print("| gate | steps | seeds | IQM | mean | min | wanted | passed |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
