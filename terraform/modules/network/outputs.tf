output "vpc_id" {
  description = "VPC id."
  value       = aws_vpc.this.id
}

output "vpc_cidr" {
  description = "Address range of the VPC."
  value       = aws_vpc.this.cidr_block
}

output "public_subnet_ids" {
  description = "Public subnets, one per zone, in zone order."
  value       = [for zone in local.zones : aws_subnet.public[zone].id]
}

output "private_subnet_ids" {
  description = "Private subnets of nodes and pods, one per zone, in zone order."
  value       = [for zone in local.zones : aws_subnet.private[zone].id]
}

output "data_subnet_ids" {
  description = "Subnets of the stateful services, without a route out, one per zone, in zone order."
  value       = [for zone in local.zones : aws_subnet.data[zone].id]
}

output "s3_prefix_list_id" {
  description = "Prefix list of S3 in this region, for egress rules."
  value       = aws_vpc_endpoint.s3.prefix_list_id
}

output "endpoints_security_group_id" {
  description = "Security group of the interface endpoints."
  value       = aws_security_group.endpoints.id
}

output "nat_gateway_ids" {
  description = "NAT gateways by zone."
  value       = { for zone, gateway in aws_nat_gateway.this : zone => gateway.id }
}
