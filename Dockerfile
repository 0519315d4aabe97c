# A Hugging Face Space (sdk: docker) or any other host. The app takes some 350 MB after its first story.
FROM python:3.11-slim
ARG TORCH_INDEX=""

RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
ENV PATH=/home/user/.local/bin:$PATH TALELOOM_HOME=/home/user/taleloom OMP_NUM_THREADS=1

COPY --chown=user pyproject.toml ./
RUN pip install --no-cache-dir --user ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep -o 'torch==[0-9.]*' pyproject.toml)"
COPY --chown=user . .
RUN pip install --no-cache-dir --user --editable .

EXPOSE 7860
HEALTHCHECK CMD python -c "import urllib.request as r; r.urlopen('http://localhost:7860/_stcore/health', timeout=3)"
CMD ["taleloom", "app", "--port", "7860", "--address", "0.0.0.0"]
