//! `verify`: check a data directory offline.

use crate::args;
use crate::failure::Failure;
use crate::output::Output;

pub(crate) fn run(_args: &args::Verify, _output: Output) -> Result<(), Failure> {
    Err(Failure::failed("INTERNAL", "not built yet"))
}
