//! `demo`.

use crate::args;
use crate::failure::Failure;
use crate::output::Output;

pub(crate) async fn run(_args: args::Demo, _output: Output) -> Result<(), Failure> {
    Err(Failure::failed("INTERNAL", "not built yet"))
}
