#!/bin/sh
# What searched ratios are worth against every published allocation, and which searcher finds them.
#
#     benchmarks/ratios.sh wikitext2-valid.txt runs/bench-ratios [wanda|together|searchers|front]...
#
# Hours on two cores; every step can be killed and run again. benchmarks/ratios.md holds what it printed.
set -eu
text=$1
out=$2
shift 2
bin=${SECATEUR:-.venv/bin/secateur}
model=${MODEL:-.cache/SmolLM2-135M-Instruct.Q4_1.gguf}
cal=$out/calibration     # 4,096 selection tokens, 8,192 holdout tokens
small=$out/calibration-2 # a quarter of both, in shorter sequences, for comparisons over seeds

[ -d "$cal" ] || "$bin" calibrate "$model" --text "$text" --tokens 8192 --selection-tokens 4096 \
  --holdout-tokens 8192 --out "$cal"
[ -d "$small" ] || "$bin" calibrate "$model" --text "$text" --tokens 8192 --selection-tokens 1024 \
  --holdout-tokens 2048 --sequence-length 256 --out "$small"

for part in "${@:-wanda together searchers front}"; do
  for step in $part; do
    case $step in
      wanda) # searched ratios beside every published allocation, 30 minutes of measuring
        for sparsity in 0.6 0.7; do
          "$bin" search "$cal" --space layer --metric wanda --searcher descent --sparsity $sparsity \
            --budget 1800s --out "$out/wanda-$sparsity"
        done ;;
      together) # metric alone, ratios alone, both: at equal cost, three seeds
        "$bin" search "$small" --space tree --sparsity 0.6 --objectives kl --budget 90ktokens --seeds 3 \
          --out "$out/metric"
        "$bin" search "$small" --space layer --metric wanda --searcher descent --sparsity 0.6 \
          --budget 90ktokens --seeds 3 --out "$out/ratios"
        "$bin" search "$small" --space tree+layer --sparsity 0.6 --objectives kl --budget 90ktokens --seeds 3 \
          --out "$out/joint"
        "$bin" compare "$out/metric" "$out/ratios" "$out/joint" ;;
      searchers) # all searchers on one space at one cost, three seeds
        for searcher in descent evolution tpe nsga3 gp random; do
          "$bin" search "$small" --space curve --metric wanda --sparsity 0.6 --searcher $searcher \
            --budget 50ktokens --seeds 3 --out "$out/$searcher"
        done
        "$bin" compare "$out/descent" "$out/evolution" "$out/tpe" "$out/nsga3" "$out/gp" \
          "$out/random" ;;
      front) # the whole front of sparsity against KL in one run
        "$bin" search "$small" --space layer --metric wanda --searcher descent --sparsity 0.3:0.75 \
          --objectives kl,density --budget 300ktokens --out "$out/front-descent"
        "$bin" search "$small" --space curve --metric wanda --searcher nsga3 --sparsity 0.3:0.75 \
          --objectives kl,density --budget 300ktokens --out "$out/front" ;;
    esac
  done
done
