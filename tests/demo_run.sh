# SPDX-License-Identifier: Apache-2.0
# For tests that train: eight pictures of the demo in d/, and FILE, a configuration of one step on them. Sourced; $fdhpc and FDHPC_INPUT are set.
demo_run() { # demo_run FILE
    models=$FDHPC_INPUT/demo
    cat >"$1" <<END
extends = "$FDHPC_INPUT/demo.cfg";
trainer = { max_steps = 1; checkpoint_dir = "run"; checkpointing_steps = 0; sampling_steps = 0; };
model = { base = "$models/text_encoder"; };
vae = { pretrained_model_name_or_path = "$models/vae"; };
data = { data_path = "d/shapes-000000.tar"; batch_size = 4; tokenizer = "$models/tokenizer"; };
END
    "$fdhpc" demo d --samples 8 --prompts 2 2>/dev/null
}
