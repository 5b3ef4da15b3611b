"""The Kubernetes objects of a description's jobs: pure functions from one to the other.

A job on TPUs is a JobSet with one Job a slice and one pod a host, a job without them a Job.
`optimer serve` is a Deployment behind a Service that only the study's workers reach. What a pod
exits with says what follows: 75 (stopped, and its state is saved) and the loss of its node start
it again without counting, anything else counts among `Cluster.restarts`.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable

import yaml

from launch.description import (
  PORT,
  SERVE,
  Description,
  Job,
  Stage,
  addressed,
  check_shared,
  jobs,
  label,
  made,
  name_of,
)
from optimer_jax.cli import STOPPED
from optimer_jax.errors import UsageError
from optimer_jax.planning.topologies import CHIPS_PER_HOST, Topology

# cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: the node label of each kind of chip.
ACCELERATORS = {
  'v4': 'tpu-v4-podslice',
  'v5e': 'tpu-v5-lite-podslice',
  'v5p': 'tpu-v5p-slice',
  'v6e': 'tpu-v6e-slice',
}
DIGEST = 'optimer/digest'  # an annotation


@dataclasses.dataclass(frozen=True)
class Cluster:
  """What the description's `gke` says.

  Attributes:
    namespace: of all objects but Kueue's cluster-wide ones.
    volume: a ReadWriteMany PersistentVolumeClaim, which all pods share; RUN is in it.
    volume_gib, storage_class: of that claim, where --setup makes it.
    mount: where pods have it.
    service_account: the pods'; google_service_account: whose rights it has at Google Cloud.
    queue: a LocalQueue of Kueue; '' to submit without Kueue.
    hub_secret: a Secret with the key HF_TOKEN, for gated models; '' for none.
    user: numeric id that the image's process runs as.
    grace_s: seconds from SIGTERM to SIGKILL; more than saving a state takes.
    restarts: how often a job may fail.
  """

  namespace: str = 'default'
  volume: str = 'optimer-runs'
  volume_gib: int = 1024
  storage_class: str = 'standard-rwx'
  mount: str = '/runs'
  service_account: str = 'optimer'
  google_service_account: str = ''
  queue: str = ''
  hub_secret: str = ''
  user: int = 1000
  grace_s: int = 600
  restarts: int = 3


def cluster_of(description: Description) -> Cluster:
  """Checks what jobs on a cluster need, too.

  Raises:
    UsageError: a name or value is wrong or missing.
  """
  cluster = made(Cluster, description.gke, f'{description.name}: gke')
  check_shared(description, cluster.mount)
  return cluster


def manifests(description: Description, job: Job) -> list[dict]:
  """The Kubernetes objects of a job.

  Raises:
    UsageError: the cluster's description is wrong, or the job's slices cannot be had.
  """
  cluster = cluster_of(description)
  if job.stage == SERVE:
    return _server(description, cluster, job)
  found = (_jobset if job.on.topology else _job)(description, cluster, job)
  return [_digested(found)]


def _meta(description: Description, cluster: Cluster, job: Job) -> dict:
  labels = _labels(description, job)
  if cluster.queue and job.stage != SERVE:
    labels['kueue.x-k8s.io/queue-name'] = cluster.queue
  name = object_name(description, job)
  return {'name': name, 'namespace': cluster.namespace, 'labels': labels}


def object_name(description: Description, job: Job) -> str:
  """UsageError if the names that Kubernetes makes of it, for pods, would be too long."""
  name = f'{description.name}-{job.name}'
  if len(name) > 46:
    raise UsageError(f'{name}: names of jobs may have 46 letters on a cluster: shorten it')
  return name


def _labels(description: Description, job: Job) -> dict:
  return {
    'app.kubernetes.io/name': 'optimer',
    'app.kubernetes.io/instance': description.name,
    'app.kubernetes.io/component': job.stage,
    'optimer/study': label(job.study) or 'default',
  }


def _jobset(description: Description, cluster: Cluster, job: Job) -> dict:
  one = dataclasses.replace(job.on.topology, slices=1)
  if job.on.topology.slices > 1 and one.hosts == 1:
    raise UsageError(
      f'{job.name}: {job.on.topology.name}: GKE joins slices of several hosts only, and {one.name} '
      'has one'
    )
  pod = _pod(description, cluster, job, {'google.com/tpu': min(one.chips, CHIPS_PER_HOST)})
  pod['spec']['nodeSelector'] = {**_nodes(one), **pod['spec'].get('nodeSelector', {})}
  slice_job = {
    'parallelism': one.hosts,
    'completions': one.hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,  # A slice works with all its hosts or not at all.
    'podFailurePolicy': _pod_failures('FailJob'),
    'template': pod,
  }
  restarts = {
    'name': 'stopped',
    'action': 'RestartJobSetAndIgnoreMaxRestarts',
    'onJobFailureReasons': ['PodFailurePolicy'],
  }
  slices = {'name': 'slice', 'replicas': job.on.topology.slices, 'template': {'spec': slice_job}}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': _meta(description, cluster, job)
    | {
      # Each slice has a node pool, and a node pool one slice.
      'annotations': {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
      }
    },
    'spec': {
      'network': {'enableDNSHostnames': True},
      'failurePolicy': {'maxRestarts': cluster.restarts, 'rules': [restarts]},
      'replicatedJobs': [slices],
    },
  }


def _nodes(one: Topology) -> dict:
  """The labels of the nodes of a slice."""
  return {
    'cloud.google.com/gke-tpu-accelerator': ACCELERATORS[one.kind],
    'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, one.sides)),
  }


def _machine(on: Stage) -> dict:
  """What a pod without TPUs asks for."""
  return {'cpu': str(on.cpus), 'memory': f'{on.memory_gib}Gi'}


def _job(description: Description, cluster: Cluster, job: Job) -> dict:
  return {
    'apiVersion': 'batch/v1',
    'kind': 'Job',
    'metadata': _meta(description, cluster, job),
    'spec': {
      'backoffLimit': cluster.restarts,
      'podFailurePolicy': _pod_failures('Ignore'),
      'template': _pod(description, cluster, job, _machine(job.on)),
    },
  }


def _pod_failures(action: str) -> dict:
  """What does not count among the restarts: a lost node, and a process that saved its state."""
  return {
    'rules': [
      {'action': action, 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
      {
        'action': action,
        'onExitCodes': {'containerName': 'optimer', 'operator': 'In', 'values': [STOPPED]},
      },
    ]
  }


def _pod(description: Description, cluster: Cluster, job: Job, resources: dict) -> dict:
  environment = [
    {'name': 'OPTIMER_CACHE', 'value': f'{cluster.mount}/.cache'},
    {'name': 'HOME', 'value': '/tmp'},
  ]
  if cluster.hub_secret:
    key = {'name': cluster.hub_secret, 'key': 'HF_TOKEN'}
    environment.append({'name': 'HF_TOKEN', 'valueFrom': {'secretKeyRef': key}})
  command = addressed(job, f'{description.name}-{name_of(SERVE, job.study)}')
  container = {
    'name': 'optimer',
    'image': description.image,
    # Kubernetes would put the value of a variable NAME in the place of $(NAME).
    'command': [part.replace('$(', '$$(') for part in command],
    'env': environment,
    'resources': {'requests': resources, 'limits': resources},
    'volumeMounts': [{'name': 'runs', 'mountPath': cluster.mount}],
    'securityContext': {'allowPrivilegeEscalation': False},
  }
  spec = {
    'restartPolicy': 'Never',
    'serviceAccountName': cluster.service_account,
    'terminationGracePeriodSeconds': cluster.grace_s,
    'securityContext': {'runAsUser': cluster.user, 'fsGroup': cluster.user},
    'containers': [container],
    'volumes': [{'name': 'runs', 'persistentVolumeClaim': {'claimName': cluster.volume}}],
  }
  if description.spot and job.stage != SERVE:
    spot, yes = 'cloud.google.com/gke-spot', 'true'
    spec['nodeSelector'] = {spot: yes}
    spec['tolerations'] = [{'key': spot, 'operator': 'Equal', 'value': yes, 'effect': 'NoSchedule'}]
  return {'metadata': {'labels': _labels(description, job)}, 'spec': spec}


def _server(description: Description, cluster: Cluster, job: Job) -> list[dict]:
  """A Deployment, which one pod at a time owns the database of, and who may speak to it."""
  meta = lambda: _meta(description, cluster, job)
  labels, port = _labels(description, job), {'name': 'grpc', 'port': PORT, 'targetPort': PORT}
  pod = _pod(description, cluster, job, _machine(job.on))
  pod['spec'].pop('restartPolicy')
  pod['spec']['containers'][0] |= {
    'ports': [{'name': 'grpc', 'containerPort': PORT}],
    'readinessProbe': {'tcpSocket': {'port': PORT}},
  }
  workers = {**labels, 'app.kubernetes.io/component': 'search'}
  return [
    _digested(
      {
        'apiVersion': 'apps/v1',
        'kind': 'Deployment',
        'metadata': meta(),
        'spec': {
          'replicas': 1,
          'strategy': {'type': 'Recreate'},
          'selector': {'matchLabels': labels},
          'template': pod,
        },
      }
    ),
    {
      'apiVersion': 'v1',
      'kind': 'Service',
      'metadata': meta(),
      'spec': {'type': 'ClusterIP', 'selector': labels, 'ports': [port]},
    },
    {
      'apiVersion': 'networking.k8s.io/v1',
      'kind': 'NetworkPolicy',
      'metadata': meta(),
      'spec': {
        'podSelector': {'matchLabels': labels},
        'policyTypes': ['Ingress'],
        'ingress': [
          {
            'from': [{'podSelector': {'matchLabels': workers}}],
            'ports': [{'protocol': 'TCP', 'port': PORT}],
          }
        ],
      },
    },
  ]


def _digested(found: dict) -> dict:
  """Keeps a digest of what was asked for with it: the cluster adds to it."""
  text = json.dumps(found, sort_keys=True).encode()
  meta = found['metadata']
  notes = {**meta.get('annotations', {}), DIGEST: hashlib.blake2b(text, digest_size=8).hexdigest()}
  return {**found, 'metadata': {**meta, 'annotations': notes}}


def setup(description: Description) -> list[dict]:
  """What a cluster needs before the first job: namespace, account, volume and, for Kueue, quotas.

  The quota is what the description's stages ask for at most at one time.
  """
  cluster = cluster_of(description)
  meta = lambda name: {'name': name, 'namespace': cluster.namespace}
  google = cluster.google_service_account
  notes = {'annotations': {'iam.gke.io/gcp-service-account': google}} if google else {}
  found = [
    {
      'apiVersion': 'v1',
      'kind': 'ServiceAccount',
      'metadata': {**meta(cluster.service_account), **notes},
    },
    {
      'apiVersion': 'v1',
      'kind': 'PersistentVolumeClaim',
      'metadata': meta(cluster.volume),
      'spec': {
        'accessModes': ['ReadWriteMany'],
        'storageClassName': cluster.storage_class,
        'resources': {'requests': {'storage': f'{cluster.volume_gib}Gi'}},
      },
    },
  ]
  if cluster.namespace != 'default':
    namespace = {'name': cluster.namespace}
    found.insert(0, {'apiVersion': 'v1', 'kind': 'Namespace', 'metadata': namespace})
  return found + (_queues(description, cluster) if cluster.queue else [])


def _queues(description: Description, cluster: Cluster) -> list[dict]:
  kueue = lambda kind, meta, spec: {
    'apiVersion': 'kueue.x-k8s.io/v1beta2',
    'kind': kind,
    'metadata': meta,
    'spec': spec,
  }
  chips, cpus, memory = {}, 0, 0
  for step in jobs(description):
    now = collections.Counter()
    for job in step:
      if job.on.topology:
        now[dataclasses.replace(job.on.topology, slices=1)] += job.on.topology.chips
    chips = {one: max(now[one], chips.get(one, 0)) for one in {**chips, **now}}
    others = [job.on for job in step if not job.on.topology and job.stage != SERVE]
    cpus = max(cpus, sum(on.cpus for on in others))
    memory = max(memory, sum(on.memory_gib for on in others))
  flavors, tpus = [kueue('ResourceFlavor', {'name': 'optimer-cpu'}, {})], []
  for one, quota in chips.items():
    name = f'optimer-{label(one.name)}'
    flavors.append(kueue('ResourceFlavor', {'name': name}, {'nodeLabels': _nodes(one)}))
    quotas = [{'name': 'google.com/tpu', 'nominalQuota': quota}]
    tpus.append({'name': name, 'resources': quotas})
  general = [
    {'name': 'cpu', 'nominalQuota': cpus},
    {'name': 'memory', 'nominalQuota': f'{memory}Gi'},
  ]
  groups = [
    {
      'coveredResources': ['cpu', 'memory'],
      'flavors': [{'name': 'optimer-cpu', 'resources': general}],
    }
  ]
  if tpus:
    groups.append({'coveredResources': ['google.com/tpu'], 'flavors': tpus})
  local = {'name': cluster.queue, 'namespace': cluster.namespace}
  return [
    *flavors,
    kueue(
      'ClusterQueue',
      {'name': f'optimer-{cluster.queue}'},
      {'namespaceSelector': {}, 'resourceGroups': groups},
    ),
    kueue('LocalQueue', local, {'clusterQueue': f'optimer-{cluster.queue}'}),
  ]


def as_yaml(objects: Iterable[dict]) -> str:
  return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=10**6)


class _Plain(yaml.SafeDumper):
  """Writes what occurs twice twice."""

  def ignore_aliases(self, data):
    return True
