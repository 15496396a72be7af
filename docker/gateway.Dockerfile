# syntax=docker/dockerfile:1
# The OpenAI gateway alone: neither Triton nor torch in it.
FROM python:3.12-slim

WORKDIR /opt/pagetide
COPY docker/gateway.txt requirements.lock ./
# Of the lock file's versions those that the gateway imports, without tritonclient's own wishes (its HTTP client, CUDA).
RUN pip install --no-cache-dir -c requirements.lock -r gateway.txt \
    && pip install --no-cache-dir --no-deps tritonclient==2.73.0 \
    && useradd --uid 1000 --no-create-home pagetide

COPY backend_src/pagetide backend_src/pagetide
ENV PYTHONPATH=/opt/pagetide/backend_src PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
EXPOSE 9000
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s --retries=3 CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9000/health', timeout=8)"]
ENTRYPOINT ["python3", "-m", "pagetide.gateway"]
