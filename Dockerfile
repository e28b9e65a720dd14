# Builds from Docker's and Python's registries alone:  docker build -t perturbgene .
# On Linux pip's torch brings CUDA; for a smaller image without it:  --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
# Run:  docker run --rm -v "$PWD:/data" perturbgene predict /data/runs/mlm /data/cells.h5ad --output /data/predicted.h5ad
#       (with a GPU: --gpus all)
FROM python:3.11-slim
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /opt/perturbgene
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY perturbgene perturbgene
RUN pip install --no-cache-dir -c constraints.txt --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple torch \
 && pip install --no-cache-dir -c constraints.txt . \
 && useradd --create-home user
USER user
WORKDIR /data
ENTRYPOINT ["perturbgene"]
