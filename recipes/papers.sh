#!/usr/bin/env bash
# All papers of recipes/README.md, one after the other, on two cores: about five hours and a quarter, the sum of the minutes
# there and of the three models that they share. What has its report in out/papers is skipped, so that after an
# interruption the same command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."

recipes=(
    speculate contrast contrast_writing consensus tax compeft cabrita membership
    stability fineline interpolation spikes write_data engrave specialize choosing
    qlora_formats qlora bezoar attention incite llava
)
for name in "${recipes[@]}"; do
    if [ -e "out/papers/$name.md" ]; then
        echo "$name: done, see out/papers/$name.md"
    else
        python "recipes/$name.py"
    fi
done
