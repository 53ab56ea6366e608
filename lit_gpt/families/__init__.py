"""The Hugging Face families: one file each, found by listing this folder, so that a new one touches nothing else.

A family's file defines

    MODEL_TYPES           the `model_type`s of config.json that it answers to
    WRAPPERS              those of models with other towers, whose language model a family is; see registry
    PRESETS               {name: fields of config.json} of published sizes, for use without weights
    config(hf)            the fields of lit_gpt.Config for a config.json
    weights(config)       {lit module: where its tensors lie in the Hugging Face file}, run in both directions by
                          lit_gpt.conversion.weights
    DEFAULTS              {model_type: what transformers takes for fields of config.json that are left out}, if a
                          field's absence would be read otherwise
    HEAD_APART            if true, a head stored beside a tied embedding stays apart even where it equals it
    DERIVED               patterns of stored tensors that are not weights, if there are others than rotary frequencies
    LEFT_OUT              {pattern of stored tensors: what they are} for a part that neither we nor transformers have
    gguf(config)          the tables.Layout of llama.cpp; without it, GGUF files go neither out nor in
    ARCHITECTURES         its names there
    MARK                  the key of a file's metadata by which it is this family's, if it shares its name with another
    from_gguf(said)       the fields of config.json that are its own, from what a file says
    MODULES               {name of a tensor's module in files: in transformers' model}, where transformers 5 renames it
    tiny_hf(**fields)     a small transformers configuration per layout, for the parity tests
"""
