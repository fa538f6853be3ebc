//! Completions and manual pages, made from the command line itself.

use std::io::{self, Write};

use clap::CommandFactory;

use crate::args::{self, Args};
use crate::failure::Failure;

pub(crate) fn completions(args: &args::Completions) -> Result<(), Failure> {
    // clap_complete panics where it cannot write; memory always takes it.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Args::command(), "mainstay", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script).and_then(|()| out.flush()).map_err(|error| Failure::io("standard output", &error))
}

pub(crate) fn man(args: &args::Man) -> Result<(), Failure> {
    let failed = |error: &io::Error| Failure::io(args.dir.display(), error);
    std::fs::create_dir_all(&args.dir).map_err(|error| failed(&error))?;
    clap_mangen::generate_to(Args::command(), &args.dir).map_err(|error| failed(&error))
}
