#!/usr/bin/env bash
# Fetch h5ad files into a folder, checked and resumable:  ./download_dataset.sh URL ... --output FOLDER   (perturbgene download --help)
cd "$(dirname "$0")" && make -s install && exec .venv/bin/perturbgene download "$@"
