//! Completions and manual pages, made from the command line itself.

use std::io;

use clap::CommandFactory;

use crate::args::{self, Args};
use crate::failure::Failure;

pub(crate) fn completions(args: &args::Completions) -> Result<(), Failure> {
    clap_complete::generate(args.shell, &mut Args::command(), "mainstay", &mut io::stdout().lock());
    Ok(())
}

pub(crate) fn man(args: &args::Man) -> Result<(), Failure> {
    let failed = |error: &io::Error| Failure::io(args.dir.display(), error);
    std::fs::create_dir_all(&args.dir).map_err(|error| failed(&error))?;
    clap_mangen::generate_to(Args::command(), &args.dir).map_err(|error| failed(&error))
}
