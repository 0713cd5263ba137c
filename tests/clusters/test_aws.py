"""What Ray asks of AWS for clusters/aws.yaml: its own provider with moto's account, in this process.

The whole `ray up`, with an autoscaler that asks and hosts that answer: tests/cluster/test_ray_up_aws.py.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as ray_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.commands import _bootstrap_config

FILE = Path(__file__).parents[2] / "clusters" / "aws.yaml"
SETTINGS = yaml.safe_load(FILE.read_text())
REGION = SETTINGS["provider"]["region"]
TYPES = SETTINGS["available_node_types"]
HEAD = SETTINGS["head_node_type"]


def launch(settings, cluster):
    """One node of each type, asked for as `ray up` asks for the head and its autoscaler for the others. The provider."""
    provider = AWSNodeProvider(settings["provider"], cluster)
    for name, kind in settings["available_node_types"].items():
        role = "head" if name == HEAD else "worker"
        tags = {"ray-node-type": role, "ray-user-node-type": name, "ray-launch-config": "0", "ray-node-name": name}
        provider.create_node((settings["head_node"] if name == HEAD else {}) | kind["node_config"], tags, 1)
    return provider


def instances(ec2, cluster):
    """Its instances by node type."""
    of_cluster = [{"Name": "tag:ray-cluster-name", "Values": [cluster]}]
    answer = ec2.describe_instances(Filters=of_cluster)["Reservations"]
    found = [one for group in answer for one in group["Instances"]]
    by_type = {tag["Value"]: one for one in found for tag in one["Tags"] if tag["Key"] == "ray-user-node-type"}
    assert len(by_type) == len(found)
    return by_type


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """An account in which a user made the security group, and then a node of each type came up.

    settings: the cluster file as `ray up` has it once it has asked AWS. instances: by node type. groups: all security
    groups before Ray came. home: the user's folder. ec2, iam: clients.
    """
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(home))
        patch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
        patch.setattr(ray_aws, "time", SimpleNamespace(sleep=lambda _: None))  # until all of AWS knows a new role
        ec2, iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        (vpc,) = ec2.describe_vpcs()["Vpcs"]
        group = ec2.create_security_group(GroupName="rporec", Description="rporec", VpcId=vpc["VpcId"])["GroupId"]
        within = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[within, ssh])
        groups = ec2.describe_security_groups()["SecurityGroups"]
        settings = _bootstrap_config(yaml.safe_load(FILE.read_text().replace("SECURITY_GROUP", group)), True)
        launch(settings, "rporec")
        found = instances(ec2, "rporec")
        yield SimpleNamespace(
            settings=settings, instances=found, groups=groups, group=group, home=home, ec2=ec2, iam=iam
        )


def test_every_node_is_asked_for_as_its_type_says(aws):
    assert aws.instances.keys() == TYPES.keys()
    for name, one in aws.instances.items():
        assert one["InstanceType"] == TYPES[name]["node_config"]["InstanceType"]
        assert one.get("InstanceLifecycle") == ("spot" if name in ("rollout", "reward") else None)
        assert one["ImageId"] == "IMAGE"
        assert one["KeyName"] == f"ray-autoscaler_{REGION}"
        (disk,) = one["BlockDeviceMappings"]
        assert disk["DeviceName"] == one["RootDeviceName"]
        (volume,) = aws.ec2.describe_volumes(VolumeIds=[disk["Ebs"]["VolumeId"]])["Volumes"]
        assert (volume["Size"], volume["VolumeType"]) == (300 if name == "learner" else 200, "gp3")


def test_nothing_is_opened_beyond_what_the_users_group_opens(aws):
    assert aws.ec2.describe_security_groups()["SecurityGroups"] == aws.groups
    for one in aws.instances.values():
        assert [group["GroupId"] for group in one["SecurityGroups"]] == [aws.group]


def test_the_head_and_only_the_head_may_start_machines(aws):
    profile = aws.iam.get_instance_profile(InstanceProfileName="ray-autoscaler-v1")["InstanceProfile"]
    # Workers have no role, so the head needs no right to pass one on.
    profiles = {name: one.get("IamInstanceProfile", {}).get("Arn") for name, one in aws.instances.items()}
    assert profiles == dict.fromkeys(TYPES) | {HEAD: profile["Arn"]}
    (role,) = profile["Roles"]
    policies = aws.iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"]
    assert "AmazonEC2FullAccess" in {policy["PolicyName"] for policy in policies}


def test_the_key_is_made_for_its_owner_alone(aws):
    key = aws.home / ".ssh" / f"ray-autoscaler_{REGION}.pem"
    assert aws.settings["auth"]["ssh_private_key"] == str(key)
    assert key.stat().st_mode & 0o777 == 0o600


def test_the_machines_have_the_cores_and_gpus_that_the_file_promises(aws):
    bare = yaml.safe_load(FILE.read_text())
    for kind in bare["available_node_types"].values():
        kind["resources"] = {}
    machines = AWSNodeProvider.fillout_available_node_types_resources(bare)["available_node_types"]
    for name, kind in TYPES.items():
        promised = {key: kind["resources"].get(key) for key in ("CPU", "GPU")}
        assert promised == {key: machines[name]["resources"].get(key) for key in ("CPU", "GPU")}


def test_down_ends_machines_and_their_disks(aws):
    provider = launch(aws.settings, "second")
    nodes = provider.nodes_for_teardown({})
    assert len(nodes) == len(TYPES)
    provider.terminate_nodes(nodes)
    ended = instances(aws.ec2, "second")
    assert {one["State"]["Name"] for one in ended.values()} == {"terminated"}
    assert len(aws.ec2.describe_volumes()["Volumes"]) == len(aws.instances)  # those of the first cluster
