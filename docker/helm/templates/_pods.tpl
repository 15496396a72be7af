{{/* A machine that Triton and the engine's first ranks run on. */}}
{{- define "pagetide.tritonPod" -}}
metadata:
  labels: {{- include "pagetide.labels" . | nindent 4 }}
    app.kubernetes.io/component: triton
spec:
  # Five seconds until nobody sends requests here any more, the answers under way, and Triton's own end.
  terminationGracePeriodSeconds: {{ add .Values.drainSeconds 35 }}
  automountServiceAccountToken: false
  securityContext: {{- include "pagetide.podSecurity" . | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  initContainers:
    - name: model
      image: {{ .Values.image.triton }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python3, scripts/prepare.py, {{ .Values.model | quote }}, --cache-dir, /cache]
      env:
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ include "pagetide.secret" . }}, key: HF_TOKEN, optional: true}}
      securityContext: {{- include "pagetide.security" . | nindent 8 }}
      resources: {{- toYaml .Values.resources.triton | nindent 8 }}
      volumeMounts: {{- include "pagetide.mounts" . | nindent 8 }}
  containers:
    - name: triton
      image: {{ .Values.image.triton }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args:
        {{- if not .Values.inferenceExtension.enabled }}
        - --no-gateway
        {{- end }}
        - --drain-s={{ .Values.drainSeconds }}
        - --model={{ .Values.model }}
        {{- if gt (int .Values.gpus) 0 }}
        - --tensor-parallel-size={{ mul .Values.gpus .Values.nodes }}
        {{- else }}
        - --device=cpu
        {{- end }}
        {{- if gt (int .Values.nodes) 1 }}
        - --ranks-per-node={{ .Values.gpus }}
        - --rendezvous=$(LWS_LEADER_ADDRESS):29500
        {{- end }}
        {{- if .Values.inferenceExtension.enabled }}
        - --metric-names=vllm
        {{- end }}
        {{- with .Values.otlpTracesEndpoint }}
        - --otlp-traces-endpoint={{ . }}
        {{- end }}
        {{- range $name, $value := .Values.options }}
        - {{ include "pagetide.option" (dict "name" $name "value" $value) | quote }}
        {{- end }}
      env:
        {{- if .Values.inferenceExtension.enabled }}
        - name: PAGETIDE_API_KEYS
          valueFrom: {secretKeyRef: {name: {{ include "pagetide.secret" . }}, key: API_KEYS, optional: true}}
        {{- end }}
        - name: ADMIN_TOKEN
          valueFrom: {secretKeyRef: {name: {{ include "pagetide.secret" . }}, key: ADMIN_TOKEN, optional: true}}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ include "pagetide.secret" . }}, key: HF_TOKEN, optional: true}}
      ports:
        - {name: http, containerPort: 8000}
        - {name: grpc, containerPort: 8001}
        - {name: metrics, containerPort: 8002}
        {{- if .Values.inferenceExtension.enabled }}
        - {name: openai, containerPort: 9000}
        {{- end }}
      startupProbe:
        exec: {command: [python3, scripts/health.py, ready]}
        periodSeconds: 5
        timeoutSeconds: 20
        failureThreshold: {{ div .Values.startSeconds 5 }}
      # Ready: this replica answers now. Live: a restart would help nobody.
      readinessProbe:
        {{- if .Values.inferenceExtension.enabled }}
        # Requests come to its gateway, which knows whether the engine answers.
        httpGet: {path: /health, port: openai}
        {{- else }}
        exec: {command: [python3, scripts/health.py, ready]}
        {{- end }}
        periodSeconds: 5
        timeoutSeconds: 20
        failureThreshold: 2
      livenessProbe:
        exec: {command: [python3, scripts/health.py, live]}
        periodSeconds: 10
        timeoutSeconds: 20
        failureThreshold: 3
      lifecycle:
        preStop: {exec: {command: [sleep, "5"]}}
      securityContext: {{- include "pagetide.security" . | nindent 8 }}
      resources:
        requests: {{- toYaml .Values.resources.triton.requests | nindent 10 }}
        limits: {{- toYaml .Values.resources.triton.limits | nindent 10 }}
          {{- if gt (int .Values.gpus) 0 }}
          nvidia.com/gpu: {{ .Values.gpus }}
          {{- end }}
      volumeMounts: {{- include "pagetide.mounts" . | nindent 8 }}
  {{- include "pagetide.place" . | nindent 2 }}
{{- end }}

{{/* A machine of a model that is split over several: further ranks. */}}
{{- define "pagetide.rankPod" -}}
metadata:
  labels: {{- include "pagetide.labels" . | nindent 4 }}
    app.kubernetes.io/component: rank
spec:
  automountServiceAccountToken: false
  securityContext: {{- include "pagetide.podSecurity" . | nindent 4 }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: ranks
      image: {{ .Values.image.triton }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      {{- $settings := dict "model" .Values.model "cache_dir" "/cache" "tensor_parallel_size" (mul .Values.gpus .Values.nodes) "ranks_per_node" .Values.gpus "rendezvous" "LEADER:29500" }}
      command: [sh, -c]
      args:
        - |
          echo '{{ toJson $settings }}' | sed "s/LEADER/$LWS_LEADER_ADDRESS/" > /tmp/settings.json
          exec python3 -m pagetide.engine.node "$LWS_WORKER_INDEX" /tmp/settings.json
      env:
        - {name: PYTHONPATH, value: /opt/pagetide/backend_src}
        - name: HF_TOKEN
          valueFrom: {secretKeyRef: {name: {{ include "pagetide.secret" . }}, key: HF_TOKEN, optional: true}}
      securityContext: {{- include "pagetide.security" . | nindent 8 }}
      resources:
        requests: {{- toYaml .Values.resources.triton.requests | nindent 10 }}
        limits: {{- toYaml .Values.resources.triton.limits | nindent 10 }}
          nvidia.com/gpu: {{ .Values.gpus }}
      volumeMounts: {{- include "pagetide.mounts" . | nindent 8 }}
  {{- include "pagetide.place" . | nindent 2 }}
{{- end }}

{{- define "pagetide.place" -}}
volumes:
  - name: cache
    persistentVolumeClaim: {claimName: {{ include "pagetide.claim" . }}}
  - name: tmp
    emptyDir: {}
  - name: run
    emptyDir: {}
  - name: shared-memory
    emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
  {{- if .Values.modelsClaim }}
  - name: models
    persistentVolumeClaim: {claimName: {{ .Values.modelsClaim }}, readOnly: true}
  {{- end }}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
