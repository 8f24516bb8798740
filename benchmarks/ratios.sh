#!/bin/sh
# What searched ratios are worth against every published allocation, and which searcher finds them.
#
#     benchmarks/ratios.sh wikitext2-valid.txt runs/bench-ratios
#
# Hours on two cores; every step can be killed and run again. benchmarks/ratios.md holds what it printed.
set -eu
text=$1
out=$2
bin=${SECATEUR:-.venv/bin/secateur}
model=${MODEL:-.cache/SmolLM2-135M-Instruct.Q4_1.gguf}
cal=$out/calibration

[ -d "$cal" ] || "$bin" calibrate "$model" --text "$text" --tokens 8192 --selection-tokens 4096 \
  --holdout-tokens 8192 --out "$cal"

# Wanda with searched ratios, 30 minutes of measuring.
for sparsity in 0.6 0.7; do
  "$bin" search "$cal" --space curve --metric wanda --searcher cma --sparsity $sparsity --promote 0.125 \
    --budget 1800s --out "$out/wanda-$sparsity"
done

# Metric alone, ratios alone, both together: 60 minutes each, three seeds.
"$bin" search "$cal" --space tree --sparsity 0.6 --objectives kl --budget 3600s --seeds 3 --out "$out/metric"
"$bin" search "$cal" --space curve --sparsity 0.6 --searcher cma --budget 3600s --seeds 3 --out "$out/ratios"
"$bin" search "$cal" --space tree+curve --sparsity 0.6 --objectives kl --budget 3600s --seeds 3 --out "$out/joint"
"$bin" compare "$out/metric" "$out/ratios" "$out/joint"

# All searchers on one space at one cost.
for searcher in cma evolution tpe nsga3 gp random; do
  "$bin" search "$cal" --space curve --sparsity 0.6 --searcher $searcher --budget 300ktokens --seeds 3 \
    --out "$out/$searcher"
done
"$bin" compare "$out/cma" "$out/evolution" "$out/tpe" "$out/nsga3" "$out/gp" "$out/random"

# The whole front of sparsity against KL in one run.
"$bin" search "$cal" --space curve --searcher nsga3 --sparsity 0.3:0.75 --objectives kl,density \
  --budget 1800s --out "$out/front"
