#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Wrong input: what a user may get wrong, the exit code and the message that must come of it. One row per kind:
#   wrong NAME EXIT 'PATTERN' 'CONFIGURATION' ARGUMENT...   the configuration becomes x.cfg; PATTERN is grep's (extended)
# Each message is one error line that says what and where; nothing else may be printed as an error.
case $top_builddir in /*) ;; *) top_builddir=$PWD/$top_builddir ;; esac
fdhpc=$top_builddir/fdhpc
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
wrong 'no config.json' 3 'm/? has no config.json' '' $encode
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

echo "$((rows - failed)) passed, $failed failed, 0 skipped"
exit $((failed > 0))
