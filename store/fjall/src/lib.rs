//! mainstay-store-fjall
