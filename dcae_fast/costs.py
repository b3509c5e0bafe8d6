"""Parameters and FLOPs of the models in the zoo, stored results of `describe.cost` and `describe.diffusion_cost`."""

# name: (parameters, FLOPs to encode and decode one picture of 512 x 512 pixels)
AUTOENCODERS = {
    "dc-ae-f32c32-in-1.0": (323_356_460, 4_854_927_851_520),
    "dc-ae-f64c128-in-1.0": (676_896_140, 4_901_813_878_784),
    "dc-ae-f128c512-in-1.0": (1_120_682_252, 4_916_470_874_112),
    "dc-ae-f32c32-mix-1.0": (323_356_460, 4_854_927_851_520),
    "dc-ae-f64c128-mix-1.0": (676_896_140, 4_901_813_878_784),
    "dc-ae-f128c512-mix-1.0": (1_120_682_252, 4_916_470_874_112),
    "dc-ae-f32c32-in-1.0-256px": (323_356_460, 4_854_927_851_520),
    "dc-ae-f32c32-sana-1.0": (312_250_275, 3_387_052_523_520),
    "dc-ae-f32c32-sana-1.1": (312_250_275, 3_387_052_523_520),
    "dc-ae-lite-f32c32-sana-1.1": (421_181_228, 3_173_427_707_904),
    "dc-ae-f32c128-1.5": (523_609_740, 5_702_475_055_104),
    "dc-ae-f64c128-1.5": (714_741_644, 5_726_936_236_032),
    "dc-ae-tiny": (2_862_092, 25_866_534_912),
}
# name: (parameters of the transformer, FLOPs of one call with one latent)
DIFFUSION_MODELS = {
    "dc-ae-f32c32-in-1.0-dit-xl-in-512px": (675_184_960, 237_271_154_688),
    "dc-ae-f32c32-in-1.0-dit-xl-in-512px-trainbs1024": (675_184_960, 237_271_154_688),
    "dc-ae-f32c32-in-1.0-uvit-s-in-512px": (44_788_768, 24_513_781_760),
    "dc-ae-f32c32-in-1.0-uvit-h-in-512px": (500_868_896, 266_412_386_304),
    "dc-ae-f32c32-in-1.0-uvit-2b-in-512px": (1_580_396_576, 829_642_932_224),
    "dc-ae-f32c32-in-1.0-usit-h-in-512px": (500_868_896, 266_412_386_304),
    "dc-ae-f32c32-in-1.0-usit-2b-in-512px": (1_580_396_576, 829_642_932_224),
    "dc-ae-f64c128-in-1.0-uvit-h-in-512px": (500_868_992, 66_487_265_280),
    "dc-ae-f64c128-in-1.0-uvit-h-in-512px-train2000k": (500_868_992, 66_487_265_280),
    "dc-ae-f64c128-in-1.0-uvit-2b-in-512px": (1_580_396_672, 209_274_699_776),
    "dc-ae-f64c128-in-1.0-uvit-2b-in-512px-train2000k": (1_580_396_672, 209_274_699_776),
    "dc-ae-f32c32-in-1.0-sit-xl-in-512px": (675_148_064, 237_252_280_320),
    "dc-ae-f64c128-1.5-usit-2b-in-512px": (1_580_396_672, 209_274_699_776),
    "dc-ae-f64c128-1.5-usit-3b-in-512px": (3_107_725_440, 411_801_780_224),
    "dc-ae-tiny-uvit-digits": (3_371_776, 464_557_056),
}
