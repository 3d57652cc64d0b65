{{/* First part of all names. */}}
{{- define "millstream.fullname" -}}
{{- $given := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-millstream" .Release.Name) (contains "millstream" .Release.Name)) -}}
{{- $given | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Labels that select pods: of (dict "root" $ "role" ROLE), or of all without a role. */}}
{{- define "millstream.selector" -}}
app.kubernetes.io/name: millstream
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .role }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "millstream.labels" -}}
{{ include "millstream.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* The role whose pod serves a model, and so has the release's proxy beside it; empty: proxies are pods of their own. */}}
{{- define "millstream.modelRole" -}}
{{- $trains := and .Values.trainer.enabled .Values.trainer.servesModel -}}
{{- if and $trains .Values.model.enabled }}{{ fail "trainer and model would both serve a model: set model.enabled or trainer.servesModel to false, or install two releases" }}{{ end -}}
{{- if $trains }}trainer{{ else if .Values.model.enabled }}model{{ end -}}
{{- end }}

{{/* The addresses of the proxies, as the setting proxy_url. */}}
{{- define "millstream.proxyUrl" -}}
{{- $name := include "millstream.fullname" . -}}
{{- $beside := include "millstream.modelRole" . -}}
{{- if $beside -}}
http://{{ $name }}-{{ $beside }}:8400
{{- else if .Values.proxy.enabled -}}
{{- $urls := list -}}
{{- range $i := until (int .Values.proxy.replicas) }}{{ $urls = append $urls (printf "http://%s-proxy-%d.%s-proxy:8400" $name $i $name) }}{{ end -}}
{{- join "," $urls -}}
{{- end -}}
{{- end }}

{{/* All settings, name -> value. Those of the values come before the chart's own. */}}
{{- define "millstream.settings" -}}
{{- $name := include "millstream.fullname" . -}}
{{- $own := dict "health_host" "0.0.0.0" "proxy_url" (include "millstream.proxyUrl" .) "blob_url" (.Values.blobs.url | default "/blobs") -}}
{{- $own = merge $own (dict "runner_processes" .Values.runner.processes "runner_concurrency" .Values.runner.concurrency) -}}
{{- if .Values.gateway.enabled }}{{ $own = merge $own (dict "gateway_url" (printf "http://%s-gateway:8600" $name)) }}{{ end -}}
{{- if .Values.kafkaTls.ca.name }}{{ $own = merge $own (dict "kafka_security_ca_file" "/kafka-ca/ca.crt") }}{{ end -}}
{{- if .Values.kafkaTls.client.name }}{{ $own = merge $own (dict "kafka_security_cert_file" "/kafka-client/tls.crt" "kafka_security_key_file" "/kafka-client/tls.key") }}{{ end -}}
{{- if or .Values.trainer.enabled .Values.model.enabled }}{{ $own = merge $own (dict "weights_root" "/data") }}{{ end -}}
{{- toJson (merge (deepCopy .Values.settings) $own) -}}
{{- end }}

{{- define "millstream.partitions" -}}
{{- get (include "millstream.settings" . | fromJson) "kafka_partitions" | default 8 | int -}}
{{- end }}

{{/* Fails if a consumer group would have more members than partitions: (dict "root" $ "what" VALUE "n" REPLICAS). */}}
{{- define "millstream.checkReplicas" -}}
{{- $most := include "millstream.partitions" .root | int -}}
{{- if gt (int .n) $most }}{{ fail (printf "%s is %d, of at most kafka_partitions, %d: a process without a partition has no work" .what (int .n) $most) }}{{ end -}}
{{- end }}

{{/*
A container: (dict "root" $ "role" ROLE "values" ITS-VALUES "args" LIST "secrets" NAMES-IN-VALUES "ports" NAME->PORT
"probes" PORT-NAME "env" LIST "mounts" LIST "startSeconds" N). Every role gets Kafka's password.
*/}}
{{- define "millstream.container" -}}
{{- $root := .root -}}
{{- $v := .values -}}
{{- $image := merge (dict) ($v.image | default dict) $root.Values.image -}}
name: {{ .role }}
image: "{{ $image.repository }}:{{ $image.tag | default $root.Chart.AppVersion }}"
imagePullPolicy: {{ $image.pullPolicy }}
args: {{ toJson .args }}
envFrom:
  - configMapRef: { name: {{ include "millstream.fullname" $root }}-settings }
env:
  - { name: HOME, value: /tmp }
  {{- with .env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- range $secret, $variable := dict "kafkaPassword" "KAFKA_SECURITY_PASSWORD" "proxySecret" "PROXY_SECRET" "gatewayToken" "GATEWAY_TOKEN" "clickhousePassword" "CLICKHOUSE_PASSWORD" }}
  {{- $given := get $root.Values.secrets $secret }}
  {{- if and $given.name (has $secret (append $.secrets "kafkaPassword")) }}
  - name: MILLSTREAM_{{ $variable }}
    valueFrom: { secretKeyRef: { name: {{ $given.name }}, key: {{ $given.key }} } }
  {{- end }}
  {{- end }}
  {{- with $v.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .ports }}
ports:
  {{- range $name, $port := . }}
  - { name: {{ $name }}, containerPort: {{ $port }} }
  {{- end }}
{{- end }}
{{- with .probes }}
# A stuck process also ends by itself, with exit code 4.
startupProbe: { httpGet: { path: /livez, port: {{ . }} }, periodSeconds: 5, failureThreshold: {{ div ($.startSeconds | default 150) 5 }} }
livenessProbe: { httpGet: { path: /livez, port: {{ . }} }, periodSeconds: 10, timeoutSeconds: 5 }
readinessProbe: { httpGet: { path: /readyz, port: {{ . }} }, periodSeconds: 5, timeoutSeconds: 5 }
{{- end }}
resources: {{ toJson .resources }}
securityContext: { allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: { drop: [ALL] } }
volumeMounts:
  - { name: tmp, mountPath: /tmp }
  {{- if not $root.Values.blobs.url }}
  - { name: blobs, mountPath: /blobs }
  {{- end }}
  {{- if $root.Values.kafkaTls.ca.name }}
  - { name: kafka-ca, mountPath: /kafka-ca, readOnly: true }
  {{- end }}
  {{- if $root.Values.kafkaTls.client.name }}
  - { name: kafka-client, mountPath: /kafka-client, readOnly: true }
  {{- end }}
  {{- range concat (.mounts | default list) ($v.volumeMounts | default list) }}
  - {{ toJson . }}
  {{- end }}
{{- end }}

{{/* A pod's metadata: (dict "root" $ "role" ROLE "values" ITS-VALUES). A changed setting restarts it. */}}
{{- define "millstream.podMetadata" -}}
labels:
  {{- include "millstream.labels" . | nindent 2 }}
  {{- if or (eq .role "proxy") (eq .role (include "millstream.modelRole" .root)) }}
  millstream/proxy: "true"
  {{- end }}
annotations:
  checksum/settings: {{ include "millstream.settings" .root | sha256sum | trunc 16 | quote }}
  {{- with .values.annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* The rest of a pod's spec: (dict "root" $ "role" ROLE "values" ITS-VALUES "volumes" LIST). */}}
{{- define "millstream.pod" -}}
{{- $root := .root -}}
automountServiceAccountToken: false
{{- with $root.Values.serviceAccountName }}
serviceAccountName: {{ . }}
{{- end }}
# A service named millstream-… would become variables MILLSTREAM_…, which are no settings.
enableServiceLinks: false
securityContext: { runAsNonRoot: true, runAsUser: 10001, runAsGroup: 10001, fsGroup: 10001, seccompProfile: { type: RuntimeDefault } }
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - { name: {{ . }} }
  {{- end }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .values.affinity }}
affinity: {{ toJson . }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "millstream.selector" . | nindent 8 }}
volumes:
  - { name: tmp, emptyDir: {} }
  {{- if not $root.Values.blobs.url }}
  - name: blobs
    persistentVolumeClaim: { claimName: {{ $root.Values.blobs.existingClaim | default (printf "%s-blobs" (include "millstream.fullname" $root)) }} }
  {{- end }}
  {{- with $root.Values.kafkaTls.ca }}{{ if .name }}
  - name: kafka-ca
    secret: { secretName: {{ .name }}, items: [{ key: {{ .key }}, path: ca.crt }] }
  {{- end }}{{ end }}
  {{- with $root.Values.kafkaTls.client }}{{ if .name }}
  - name: kafka-client
    secret: { secretName: {{ .name }}, defaultMode: 0440, items: [{ key: {{ .cert }}, path: tls.crt }, { key: {{ .key }}, path: tls.key }] }
  {{- end }}{{ end }}
  {{- range concat (.volumes | default list) (.values.volumes | default list) }}
  - {{ toJson . }}
  {{- end }}
{{- end }}

{{/* A proxy's container: (dict "root" $ "probesPort" PORT). */}}
{{- define "millstream.proxyContainer" -}}
{{- $v := .root.Values.proxy -}}
{{- $args := list "proxy" "--listen" "http://0.0.0.0:8400" "--drain-s" (toString $v.drainSeconds) "--health-port" (toString .probesPort) -}}
{{- $ports := dict "http" 8400 .probes .probesPort -}}
{{- include "millstream.container" (dict "root" .root "role" "proxy" "values" $v "args" $args "secrets" (list "proxySecret") "ports" $ports "probes" .probes "resources" $v.resources) -}}
{{- end }}

{{/* Resources of a role with GPUs. */}}
{{- define "millstream.gpuResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .gpus }}{{ $resources = mergeOverwrite $resources (dict "limits" (dict .gpuResource (int .gpus))) }}{{ end -}}
{{- toJson $resources -}}
{{- end }}

{{- define "millstream.disruption" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "millstream.fullname" .root }}-{{ .role }}
  labels:
    {{- include "millstream.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .most }}
  selector:
    matchLabels:
      {{- include "millstream.selector" . | nindent 6 }}
{{- end }}

{{/* A claim that stays when the release goes: (dict "root" $ "name" NAME "values" PERSISTENCE "mode" ACCESS-MODE). */}}
{{- define "millstream.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ .name }}
  annotations: { helm.sh/resource-policy: keep }
  labels:
    {{- include "millstream.labels" (dict "root" .root) | nindent 4 }}
spec:
  accessModes: [{{ .mode }}]
  {{- with .values.storageClass }}
  storageClassName: {{ . }}
  {{- end }}
  resources: { requests: { storage: {{ .values.size }} } }
{{- end }}
