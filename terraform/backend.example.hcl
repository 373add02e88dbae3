# Remote state. Copy to backend.hcl (ignored by git), fill in, then:
#
#   terraform init -backend-config=backend.hcl
#
# The bucket is made once for each account, by hand, before the first init: versioned, private, encrypted
# with a KMS key, deletion denied to everyone but administrators. docs/aws-terraform.md has the commands.
# Give every environment its own key, better its own account: state of production must not be readable
# with development's credentials.

bucket       = "atlasco-terraform-state-123456789012"
key          = "telemetry/dev/terraform.tfstate"
region       = "eu-west-1"
encrypt      = true
kms_key_id   = "alias/atlasco-terraform-state"
use_lockfile = true
