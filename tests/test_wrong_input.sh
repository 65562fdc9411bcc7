#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Wrong input: what a user may get wrong, the exit code and the message that must come of it. One row per kind:
#   wrong NAME EXIT 'PATTERN' 'CONFIGURATION' ARGUMENT...   the configuration becomes x.cfg; PATTERN is grep's (extended)
# Each message is one error line that says what and where; nothing else may be printed as an error.
start=$PWD
case $top_builddir in /*) ;; *) top_builddir=$PWD/$top_builddir ;; esac
fdhpc=$top_builddir/fdhpc
. "$(dirname "$0")/demo_run.sh"
work=$(mktemp -d) && cd "$work" || exit 1
trap 'rm -rf "$work"' EXIT
rows=0 failed=0
HF_HOME=$work/hf; export HF_HOME
unset HF_HUB_CACHE

wrong() {
    name=$1 code=$2 pattern=$3
    printf '%s\n' "$4" >x.cfg
    shift 4
    timeout 60 "$fdhpc" "$@" >out 2>err </dev/null
    got=$?
    rows=$((rows + 1))
    if [ "$got" != "$code" ]; then
        failed=$((failed + 1))
        echo "FAIL $name: exit $got, wanted $code: $(head -c 400 err)"
    elif ! grep -Eq -- "$pattern" err; then
        failed=$((failed + 1))
        echo "FAIL $name: wanted a message with '$pattern', found: $(head -c 400 err)"
    elif [ "$(grep -c '^error: ' err)" != 1 ]; then
        failed=$((failed + 1))
        echo "FAIL $name: wanted one error, found: $(head -c 800 err)"
    else
        echo "ok   $name: $(head -n 1 err)"
    fi
}

# ---- the command line
wrong 'no such command' 2 'trian is neither a command nor a configuration file' '' trian
wrong 'no such file' 2 'nowhere.cfg' '' used nowhere.cfg
wrong 'a folder for a file' 2 '\.: not a file' '' used .
wrong 'unknown flag' 2 'unknown flag --sett; did you mean --set\?' '' used x.cfg --sett a=b
wrong 'unknown piece of work' 2 'bench: --what step,vea: step, sample, vae' '' bench x.cfg --what step,vea
wrong 'flag without value' 2 '--set needs KEY=VALUE after it' '' used x.cfg --set
wrong 'too many words' 2 'too many words; usage: fdhpc used' '' used x.cfg y.cfg
wrong '--set without =' 2 '--set trainer.seed: wanted key=value' '' used x.cfg --set trainer.seed
wrong '--set of an unknown key' 2 '--set: unknown key trainer.sede; did you mean trainer.seed\?' '' used x.cfg --set trainer.sede=1
wrong '--set of a group' 2 'trainer is a group; set its keys one by one' '' used x.cfg --set trainer=1
wrong '--set out of range' 2 '--set: trainer.zero_stage = 5 is out of range; wanted an integer from 0 to 2' '' used x.cfg --set trainer.zero_stage=5
wrong '--set of a word for a number' 2 'optimizer.lr = "fast" is a string; wanted a number' '' used x.cfg --set optimizer.lr=fast

# ---- configuration files: text
wrong 'syntax' 2 'x.cfg:2: syntax error at or before "- \\"a\\"|x.cfg:2: syntax error at or before "- "a""' 'data = { data_path =
- "a"' used x.cfg
wrong 'null' 2 'x.cfg:1: null: write "" for nothing' 'ema = { update_steps = null; };' used x.cfg
wrong 'duplicate key' 2 'x.cfg:1: duplicate setting name' 'ema = { decay = 0.5; decay = 0.6; };' used x.cfg
wrong 'integer beyond 32 bits' 2 'x.cfg:2: 5000000000 does not fit into 32 bits; write 5000000000L' 'trainer = {
  max_steps = 5000000000; };' used x.cfg
wrong 'integer beyond 64 bits' 2 'x.cfg:1: 99999999999999999999 does not fit into 64 bits' 'trainer = { seed = 99999999999999999999L; };' used x.cfg
wrong 'mixed array' 2 'x.cfg:1: mismatched element type in array.*write \(1, 2.0\)' 'optimizer = { betas = [0, 0.5]; };' used x.cfg
wrong 'file to include is missing' 2 'x.cfg:1: @include: ./part.cfg: No such file' '@include "part.cfg"' used x.cfg
wrong 'file to extend is missing' 2 'x.cfg:1: extends = "base.cfg": base.cfg: No such file' 'extends = "base.cfg";' used x.cfg
wrong 'extends itself' 2 'x.cfg: extends itself' 'extends = "x.cfg";' used x.cfg
wrong 'extends a number' 2 'x.cfg:1: extends: wanted the name of a file in quotes' 'extends = 5;' used x.cfg
printf 'trainer = { seed = 1;\0 };' >binary.cfg
wrong 'not a text file' 2 'binary.cfg: not a text file' '' used binary.cfg

# ---- configuration files: keys and values
wrong 'unknown key' 2 'x.cfg:2: unknown key trainer.max_step; did you mean trainer.max_steps\?' 'trainer = {
  max_step = 5; };' used x.cfg
wrong 'unknown group' 2 'x.cfg:1: unknown key optimiser; did you mean optimizer\?' 'optimiser = { lr = 1.0; };' used x.cfg
wrong 'key in the wrong group' 2 'unknown key model.head_dim; did you mean model.base_config_override.head_dim\?' 'model = { head_dim = 4; };' used x.cfg
wrong 'value for a group' 2 'x.cfg:1: trainer = 5 is an integer; wanted a group' 'trainer = 5;' used x.cfg
wrong 'group for a value' 2 'x.cfg:1: trainer.seed = \{ ... \} is a group; wanted an integer' 'trainer = { seed = { a = 1; }; };' used x.cfg
wrong 'float for an integer' 2 'trainer.max_steps = 2.5 is a float; wanted an integer from 1' 'trainer = { max_steps = 2.5; };' used x.cfg
wrong 'string for a boolean' 2 'model.qk_norm = "yes" is a string; wanted true or false' 'model = { qk_norm = "yes"; };' used x.cfg
wrong 'number for a string' 2 'model.base = 5 is an integer; wanted a string' 'model = { base = 5; };' used x.cfg
wrong 'integer out of range' 2 'data.batch_size = 0 is out of range; wanted an integer from 1 to 1000000 pictures' 'data = { batch_size = 0; };' used x.cfg
wrong 'float out of range' 2 'data.random_dropping_rate = 1.5 is out of range; wanted a number from 0.0 to 1.0' 'data = { random_dropping_rate = 1.5; };' used x.cfg
wrong 'float that is infinite' 2 'optimizer.lr = inf is out of range' 'optimizer = { lr = 1e999; };' used x.cfg
wrong 'word not among the choices' 2 'mixed_precision = "fp8" is not known; wanted one of "bf16", "no"' 'trainer = { mixed_precision = "fp8"; };' used x.cfg
wrong 'resume_from a word' 2 'trainer.resume_from = "newest" is no step; wanted "latest", a step or ""' 'trainer = { resume_from = "newest"; };' used x.cfg
wrong 'list with a number' 2 'data.data_path = \("a", 5\) is a list; wanted a string or a list of strings' 'data = { data_path = ("a", 5); };' used x.cfg
wrong 'pair of three' 2 'optimizer.betas = \(0.1, 0.2, 0.3\) is a list; wanted two numbers' 'optimizer = { betas = (0.1, 0.2, 0.3); };' used x.cfg
wrong 'heads not divisible' 2 'num_attention_heads = 6 is not a multiple of num_key_value_heads = 4' \
    'model = { base_config_override = { num_attention_heads = 6; num_key_value_heads = 4; }; };' used x.cfg
wrong 'channels differ' 2 'model.out_channels = 8, but model.in_channels = 16' 'model = { out_channels = 8; };' used x.cfg
wrong 'scheduler is not here' 3 'noise_scheduler.pretrained_model_name_or_path: some/thing is neither a folder.*' \
    'noise_scheduler = { pretrained_model_name_or_path = "some/thing"; };' used x.cfg

# ---- models: a copy of the demo's VAE, broken
demo=$FDHPC_INPUT/demo
[ -f "$demo/vae/config.json" ] || { echo "FDHPC_INPUT is not set to the folder input/"; exit 1; }
printf 'no picture' >picture.png

# vae EDIT-OF-CONFIG: m is a copy of the VAE whose config.json went through sed
vae() {
    rm -rf m && cp -r "$demo/vae" m && chmod -R u+w m
    sed "$1" "$demo/vae/config.json" >m/config.json
}
encode="vae encode m picture.png latents.h5"

wrong 'no such model folder' 3 'there is no folder ./nowhere' '' vae encode ./nowhere picture.png latents.h5
wrong 'model is not downloaded' 3 'REPA-E/e2e-flux-vae is neither a folder.*huggingface cache|huggingface-cli download REPA-E/e2e-flux-vae' '' \
    vae encode REPA-E/e2e-flux-vae picture.png latents.h5
wrong 'model with a licence' 3 'Its licence must be accepted' '' vae encode black-forest-labs/FLUX.1-dev picture.png latents.h5
vae '' && rm m/config.json
wrong 'no config.json' 3 'm has no config.json' '' $encode
vae '1s/{/[/'
wrong 'config.json is no JSON' 4 'm/config.json:[0-9]+: ' '' $encode
vae 's/"AutoencoderKL"/"AutoencoderDC"/'
wrong 'unknown class of model' 8 'config.json is of class AutoencoderDC; known are' '' $encode
rm -rf m && cp -r "$demo/text_encoder" m
wrong 'another kind of model' 2 'm holds a Gemma.*, expected a VAE' '' $encode
vae 's/"latent_channels": 16/"latent_channels": "16"/'
wrong 'config.json: wrong type' 4 'latent_channels is no integer' '' $encode
vae 's/"norm_num_groups": 8/"norm_num_groups": 7/'
wrong 'groups not divisible' 4 'norm_num_groups 7 does not divide' '' $encode
vae 's/"layers_per_block": 1/"layers_per_block": 2/'
wrong 'missing tensors' 4 '64 missing: encoder.down_blocks.0.resnets.1.norm1.weight, ' '' $encode
vae 's/"mid_block_add_attention": true/"mid_block_add_attention": false/'
wrong 'tensors too many' 4 '20 unknown: decoder.mid_block.attentions.0.group_norm.bias, ' '' $encode
vae 's/^    48,/    56,/'
wrong 'misshapen tensors' 4 'encoder.down_blocks.2.resnets.0.conv1.weight is \[48, 32, 3, 3\], config.json means \[56, 32, 3, 3\]' '' $encode
vae '' && rm m/*.safetensors
wrong 'no weights' 3 'm: holds no \*.safetensors' '' $encode
vae '' && head -c 100000 "$demo/vae/diffusion_pytorch_model.safetensors" >m/diffusion_pytorch_model.safetensors
wrong 'weights cut short' 4 'lie outside the file.*truncated or damaged' '' $encode
vae '' && echo 'version https://git-lfs.github.com/spec/v1' >m/diffusion_pytorch_model.safetensors
wrong 'weights are a pointer of Git LFS' 4 'no safetensors file' '' $encode
wrong 'vae: neither encode nor decode' 2 'the first word is "encrypt", expected encode or decode' '' vae encrypt m picture.png latents.h5

# ---- training: the demo, eight pictures, one step
OMP_NUM_THREADS=1
export OMP_NUM_THREADS
demo_run base.cfg || failed=1

# train NAME EXIT 'PATTERN' KEY=VALUE...
train() {
    train_name=$1 train_code=$2 train_pattern=$3
    shift 3
    for pair in "$@"; do
        set -- "$@" --set "$pair"
        shift
    done
    rm -rf run
    wrong "$train_name" "$train_code" "$train_pattern" 'extends = "base.cfg";' x.cfg "$@"
}
printf 'extends = "base.cfg"; trainer = { checkpoint_dir = "kept"; };\n' >good.cfg
"$fdhpc" good.cfg >out 2>err || { echo "FAIL what is right is refused: $(cat err)"; failed=$((failed + 1)); }

train 'no data' 2 'data.data_path is empty' data.data_path=
train 'data behind a network' 2 'http: is not supported; download' data.data_path=http://host/a.tar
train 'data from a command' 2 'commands \(pipe:\) are not run' 'data.data_path=pipe:cat a.tar'
train 'tars are missing' 5 'none of 3 tars is there; the first is a1.tar' 'data.data_path=a{1..3}.tar'
train 'brace left open' 2 'has a \{ without \}' 'data.data_path=a{1..3.tar'
: >empty.tar
train 'empty tar' 5 'no samples in 1 tars' data.data_path=empty.tar
gzip -c d/shapes-000000.tar >packed.tar
train 'compressed tar' 8 'packed.tar: is compressed' data.data_path=packed.tar
train 'no such picture column' 5 '8 have no picture .png' data.image_column=png
train 'no such caption column' 5 '8 no caption .cap' data.caption_column.synthetic=cap
train 'no caption column' 2 'data.caption_column: neither synthetic nor original' data.caption_column.synthetic=
train 'resolution not divisible' 2 'data.resolution: 72 x 72 is not divisible by 16' data.resolution=72
train 'resolution too large for the table' 2 'position table has 4 x 4 \(model.pos_embed_max_size\)' data.resolution=1024
train 'text width' 2 'model.text_hidden_size is 64, but the text states of model.base are 96 wide' model.text_hidden_size=64
train 'latent channels' 2 'model.in_channels is 4, but the VAE.*16 channels' model.in_channels=4 model.out_channels=4
train 'width not divisible' 2 'hidden_size = 190 is no multiple of 4' model.base_config_override.hidden_size=190
train 'hidden state' 2 'text_hidden_states_index 7, the model has hidden states -3 to 2' model.text_hidden_states_index=7
train 'no text encoder' 3 'model.base: there is no folder nowhere' model.base=nowhere
train 'folder without tokenizer' 3 'data.tokenizer: d has no' data.tokenizer=d
train 'no VAE' 2 'vae.pretrained_model_name_or_path is not set' vae.pretrained_model_name_or_path=
train 'no such checkpoint' 3 'step-77.h5: No such file.*there are none' trainer.resume_from=77
train 'stage that is not built' 8 'trainer.zero_stage is 2' trainer.zero_stage=2
train 'family that is not built' 8 'model.name = "FuseDiT" is not built yet' model.name=FuseDiT
train 'run folder cannot be made' 3 'base.cfg: is not a folder' trainer.checkpoint_dir=base.cfg
train 'no run folder' 2 'trainer.checkpoint_dir is empty' trainer.checkpoint_dir=
train 'index cannot be written' 3 'data.index.*base.cfg/i.h5' data.index=base.cfg/i.h5
if "$fdhpc" --version | grep -q 'cuda (not built'; then
    train 'backend that is not built' 8 'backend cuda is not built' trainer.backend=cuda
fi

# ---- sampling
wrong 'sample: nowhere to write' 2 'give -o DIR' 'extends = "base.cfg";' sample x.cfg
echo '{}' >object.json
wrong 'sample: prompts are no list' 4 'object.json: expected a JSON list of strings' 'extends = "base.cfg";' sample x.cfg -o o --prompts object.json
wrong 'sample: no checkpoint' 3 'no checkpoint' 'extends = "base.cfg"; trainer = { checkpoint_dir = "none"; };' sample x.cfg -o o
wrong 'sample: size not divisible' 2 'multiples of 16' 'extends = "good.cfg";' sample x.cfg -o o --resolution 40
wrong 'sample: no such step' 3 'step-5.h5' 'extends = "good.cfg";' sample x.cfg -o o --tag 5

# ---- checkpoints
wrong 'another model than the checkpoint' 4 'kept/checkpoints/step-1.h5' \
    'extends = "good.cfg"; trainer = { max_steps = 2; }; model = { dit_num_hidden_layers = 5; };' x.cfg
truncate -s 30000000 kept/checkpoints/step-1.h5
wrong 'checkpoint cut short' '4' 'kept/checkpoints/step-1.h5' 'extends = "good.cfg"; trainer = { max_steps = 2; resume_from = 1; };' x.cfg
echo 'no checkpoint' >kept/checkpoints/step-1.h5
wrong 'checkpoint is no HDF5' '4' 'kept/checkpoints/step-1.h5' 'extends = "good.cfg"; trainer = { max_steps = 2; resume_from = 1; };' x.cfg

wrong 'verify: no records' 1 'no case.json' '' verify d

# ---- two ranks that find the same fault: one message, the exit code of one
case $top_srcdir in /*) ;; *) top_srcdir=$start/$top_srcdir ;; esac
alone=$fdhpc
fdhpc=$work/two
printf '#!/bin/sh\nexec sh "%s/tests/mpirun.sh" "%s" "$@"\n' "$top_srcdir" "$alone" >two && chmod +x two
wrong 'two ranks: unknown key' 2 'x.cfg:1: unknown key trainer.sede' 'trainer = { sede = 1; };' x.cfg
wrong 'two ranks: no data' 2 'data.data_path is empty' 'extends = "base.cfg"; data = { data_path = ""; };' x.cfg
wrong 'two ranks: unknown flag' 2 'unknown flag --fast' '' train x.cfg --fast

echo "$((rows - failed)) passed, $failed failed, 0 skipped"
exit $((failed > 0))
