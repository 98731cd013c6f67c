#!/usr/bin/env bash
# A trained GPT-2 of transformers grows by two blocks on two CPU ranks, and plain transformers loads what it became, in a
# process that has no esper. FOLDER (default: deeper-gpt2 here) must not exist yet. Some minutes on two cores.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS=1
out="${1:-deeper-gpt2}"
[[ ! -e "$out" ]] || { echo "esper: $out exists; name another folder, or remove it" >&2; exit 2; }
mkdir -p "$out" && out="$(cd "$out" && pwd)"
esper=("$PYTHON" -m esper.cli)
train() { "$PYTHON" "$ROOT/launch/train.py" experiment=small_gpt2 telemetry.wandb.mode=disabled "$@"; }

echo "esper: 1 of 4: training a GPT-2 of two blocks"
train controller=none run.dir="$out/host"
"${esper[@]}" export "$out/host" --native --to "$out/gpt2"

actions=""
for slot in r0c0 r1c0; do
    actions+="{tick: 1, slot: $slot, op: GERMINATE, blueprint: copy, ticks: 2}, {tick: 3, slot: $slot, op: ADVANCE},"
    actions+="{tick: 6, slot: $slot, op: ADVANCE}, {tick: 8, slot: $slot, op: FOSSILIZE},"
done
echo "esper: 2 of 4: it goes on on two ranks, and a copy of each block grows behind it"
train host.path="$out/gpt2" host.options='{}' host.weights="$out/gpt2" run.dir="$out/grown" \
    'slots.blocks=[copy]' slots.incubation=immediate gates=observe controller=schedule "controller.actions=[${actions%,}]"

echo "esper: 3 of 4: it becomes an ordinary GPT-2 of four blocks"
"${esper[@]}" export "$out/grown" --native --to "$out/gpt2-deeper"

echo "esper: 4 of 4: plain transformers loads it"
cd "$out" && "$PYTHON" -P - "$out/gpt2" "$out/gpt2-deeper" <<'PY'
import sys

import torch
from transformers import AutoModelForCausalLM

prompt = torch.tensor([list(b"    def get_")])
for folder in sys.argv[1:]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    said = model.generate(prompt, max_new_tokens=40, do_sample=True, temperature=0.7, pad_token_id=0)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {model.config.num_hidden_layers} blocks, {parameters:,} parameters")
    print(repr(bytes(said[0].tolist()).decode(errors="replace")))
assert "esper" not in sys.modules
PY
