"""What a user of the Hub does, with torch, transformers and soundfile alone: hub_client.py DIR CLIP ..."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

folder, *clips = sys.argv[1:]
found = {}
found["project"] = [name for name in ("model", "core", "peft", "pydantic", "soxr") if name in sys.modules]
try:
    import peft

    found["project"].append(peft.__name__)
except ImportError:
    pass
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
found["report"] = {key: sorted(value) for key, value in report.items() if value}
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def answers(model, processor):
    chats = [
        [
            {
                "role": "user",
                "content": [{"type": "audio", "audio": clip}, {"type": "text", "text": f"Say {number}"}],
            }
        ]
        for number, clip in enumerate(clips)
    ]
    inputs = processor.apply_chat_template(chats).to(model.device)
    return model.generate(**inputs, max_new_tokens=15).tolist()


found["ids"] = answers(model, processor)
found["text"] = processor.batch_decode(torch.tensor(found["ids"]))
found["tied"] = model.ctc_head.weight is model.llm.get_output_embeddings().weight
one = processor(text="Say 0", audio=clips[0])
found["one"] = model.generate(**one, max_new_tokens=15).tolist()
text_only = processor.apply_chat_template([{"role": "user", "content": "Hello."}])
found["text only"] = model.generate(**text_only, max_new_tokens=5).tolist()

speak = pipeline("any-to-any", model=folder, trust_remote_code=True)
part = [{"type": "audio", "audio": clips[0]}, {"type": "text", "text": "Say 0"}]
spoken = speak(text=[{"role": "user", "content": part}], max_new_tokens=15, return_full_text=False)
found["pipeline"] = spoken[0]["generated_text"]

copy = Path("copy")
model.save_pretrained(copy)
processor.save_pretrained(copy)
again = AutoModel.from_pretrained(copy, trust_remote_code=True)
found["round trip"] = answers(again, AutoProcessor.from_pretrained(copy, trust_remote_code=True))

half = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
found["dtypes"] = sorted(
    {str(p.dtype) for n, p in half.named_parameters() if n.startswith(("llm", "encoder"))}
)
found["adapters"] = sorted({str(p.dtype) for n, p in half.named_parameters() if n.startswith("alignment")})
answers(half, processor)
for attention in ("eager", "sdpa"):
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True, attn_implementation=attention)
    inside = {loaded.llm.config._attn_implementation, loaded.encoder.layers.config._attn_implementation}
    found[attention] = [sorted(inside), answers(loaded, processor)]
for name, options in {
    "flash": {"attn_implementation": "flash_attention_2"},
    "unknown attention": {"attn_implementation": "fast"},
    "device map": {"device_map": "cpu"},
}.items():
    try:
        AutoModel.from_pretrained(folder, trust_remote_code=True, **options)
        found[name] = "loaded"
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
