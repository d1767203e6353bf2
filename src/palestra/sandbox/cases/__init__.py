"""What every sandbox must withstand and do: attacks and conformance, in files by what they are about."""
