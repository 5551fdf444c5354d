"""Atomic checkpoints: what was trained, optimizer and position. Frozen weights are recorded by SHA-256 only.

    <stage folder>/checkpoints/
        step-000500/            one checkpoint: DeepSpeed's files of all ranks, state.json, manifest.json
                                (sha256 of each file)
        step-001000.partial/    one being written, or what a kill left of it; removed at the next start,
                                unless its manifest is there: then only the rename was missing
        step-000500.damaged/    one that was found damaged; kept for manual inspection, never loaded
        latest                  name of the newest finished one; moves last
        best.json               step and score of the best validation so far

    store           save and load for one stage; the only entry for the trainer
    writer          DeepSpeed's states to files, in a thread
    verification    manifests, hashes, the newest sound checkpoint
    retention       which ones are kept, and removal
    mirror          a copy of each in a second folder (checkpoint.copy_to)
    universal       another number of ranks
    compatibility   does a checkpoint, or a finished stage, belong to this recipe, base and data

Writing: every rank copies its tensors to host memory and continues training; a thread of its own writes,
hashes and syncs them to `step-N.partial`. When all ranks report that they are done (a flag in the next step's
all-reduce), rank 0 writes the manifest, syncs, renames the folder and moves `latest`. A kill at any instant
leaves the previous checkpoint as it was. Cost: one copy of what is trained and its optimizer states (12 to 14
bytes a parameter, divided by the number of ranks) in host memory.

Reading: newest first. A folder whose files do not have the size and sha256 of its manifest gets another name,
with a line: otherwise it would be kept as the newest in place of good ones.
"""
