{{- define "pagetide.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{/* What Triton's pods belong to. LeaderWorkerSet makes a Service of its own name: no other may have it. */}}
{{- define "pagetide.set" -}}
{{- include "pagetide.name" . }}{{ if gt (int .Values.nodes) 1 }}-group{{ end }}
{{- end }}

{{/* An option of serve.sh: flags are there or not. */}}
{{- define "pagetide.option" -}}
{{- if kindIs "bool" .value }}--{{ if not .value }}no-{{ end }}{{ .name }}
{{- else if and (kindIs "float64" .value) (eq .value (floor .value)) }}--{{ .name }}={{ int64 .value }}
{{- else }}--{{ .name }}={{ .value }}
{{- end }}
{{- end }}

{{- define "pagetide.secret" -}}
{{- .Values.existingSecret | default (include "pagetide.name" .) }}
{{- end }}

{{- define "pagetide.claim" -}}
{{- .Values.cache.existingClaim | default (printf "%s-cache" (include "pagetide.name" .)) }}
{{- end }}

{{- define "pagetide.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{ include "pagetide.selector" . }}
{{- end }}

{{- define "pagetide.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "pagetide.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "pagetide.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "pagetide.mounts" -}}
- {name: cache, mountPath: /cache}
- {name: tmp, mountPath: /tmp}
- {name: run, mountPath: /opt/pagetide/.run}
- {name: shared-memory, mountPath: /dev/shm}
{{- if .Values.modelsClaim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end }}
