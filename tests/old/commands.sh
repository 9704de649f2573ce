# Writes the run folders beside this file, and figures.json with what the verbs say of them. They are of the commit that
# last changed them: newer code must read them, and find the same. From the root of a checkout: bash tests/old/commands.sh
set -eu
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1 XDG_CACHE_HOME="$PWD/cache"
vit=(--model.name=vit_tiny_patch16_224 --model.pretrained=false --model.img_size=16
     '--model.args={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}' --moe.layers=all --moe.num_experts=4)
train=(--train.epochs=4 --train.lr=3e-3 --train.precision=no --train.tensorboard=false)
rm -rf digits scenes
vimoe train --data.path=digits --data.images_per_class=16 "${vit[@]}" "${train[@]}" --train.batch_size=16 --moe.top_k=2 \
    --out digits
vimoe analyze digits --draws=4 --overrule=100
python -c "from vimoe.demo.composed_scenes import compose_scenes; compose_scenes('photos', 12, 4, 4)"
vimoe train --data.path=photos --data.task=segmentation "${vit[@]}" "${train[@]}" --train.batch_size=4 --moe.routing=token \
    --out scenes
vimoe analyze scenes --draws=4
image=$(find photos/images/test -name '*.png' | sort | head -1)
for run in digits scenes; do
    vimoe evaluate $run --json | tail -1 > evaluate-$run
    vimoe prune $run --tolerance=9 --out pruned-$run --json | tail -1 > prune-$run
done
vimoe predict digits "$image" --json | tail -1 > predict-digits
vimoe predict scenes "$image" --out masks --json | tail -1 > predict-scenes
python - <<'PYTHON'
import json
from pathlib import Path
verbs = [f"{verb}-{run}" for run in ("digits", "scenes") for verb in ("evaluate", "predict", "prune")]
figures = {verb: json.loads(Path(verb).read_text(encoding="utf-8")) for verb in verbs}
Path("figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
config = Path("scenes", "config.yaml")  # a path that is no machine's
text = config.read_text(encoding="utf-8").replace(str(Path("photos").resolve()), "PHOTOS")
config.write_text(text, encoding="utf-8")
PYTHON
rm -rf cache photos masks pruned-* evaluate-* predict-* prune-* */report.html */figures
