"""What the doctor says, in English and in Chinese. Both tables have the same keys and the same gaps to fill."""

from collections.abc import Mapping
from typing import NamedTuple


class Remark(NamedTuple):
    """A sentence before it is put into words."""

    code: str
    values: Mapping[str, object]


def remark(code: str, **values: object) -> Remark:
    """The sentence of that name, with what fills its gaps."""
    return Remark(code, values)


def in_words(what: Remark, language: str) -> str:
    """The sentence in a language of TEXTS."""
    return TEXTS[language][what.code].format(**what.values)


ENGLISH = {
    "verdict.well": "All well: run Qwen2 here in {ways}.",
    "verdict.ill": "Not well: {first}",
    "verdict.ill_more": "Not well: {first} (and {more} more below)",
    "verdict.unsupported": "Not supported: {problem}",
    # ways to run, and why
    "way.bfloat16": "bfloat16",
    "way.fixed float16": "float16 with the fix",
    "way.float32": "float32",
    "reason.native_bfloat16": "{name} computes in bfloat16 natively, and bfloat16 has float32's range: nothing "
    "overflows. The fix keeps its keys exact beside the spikes of their bias.",
    "reason.cpu_bfloat16": "This CPU has instructions for bfloat16, which has float32's range: nothing overflows. The "
    "fix keeps its keys exact beside the spikes of their bias.",
    "reason.cpu_float16": "This CPU has instructions for float16 and none for bfloat16; with the fix float16 is finite.",
    "reason.cpu_neither": "This CPU has no instructions for 16-bit floats: they are emulated, slower than float32 and "
    "less exact. Stock float32 needs no fix.",
    "reason.no_bfloat16": "{name} (compute capability {capability}) has no bfloat16: that begins at 8.0, and before it "
    "torch emulates. float16 is its fast 16-bit type, and with the fix it is finite and close to float32.",
    "reason.slow_float16": "{name} (compute capability {capability}) has no bfloat16, and computes in float16 no faster "
    "than in float32: 16 bit saves half the memory here, not time. With the fix it is finite.",
    "reason.old_amd": "{name} has no matrix instructions for bfloat16, whatever torch says of AMD cards; float16 is its "
    "fast 16-bit type, and with the fix it is finite.",
    "reason.mps": "Every Apple GPU computes in float16 natively; bfloat16 needs macOS 14 and goes by way of float32 on "
    "M1 and M2. With the fix float16 is finite and closer to float32 than bfloat16.",
    "reason.unknown_device": "What {name} does natively is not known here; float16 with the fix is finite wherever the "
    "self-test below passes.",
    "also.bfloat16_eager": 'For attention weights: attn_implementation="eager" with the fix registered; stock\'s '
    "scores are wrong in bfloat16 (1.5B and 7B).",
    "also.closest": "Closest to float32: torch.float16 with the fix; its roundings are 8 times finer than bfloat16's.",
    "also.float16_eager": 'For attention weights: attn_implementation="eager", with the fix registered.',
    "also.float32_if_it_fits": "Where float32 fits into memory, torch.float32 is as fast and needs no fix.",
    "also.half_the_memory": "Where float32 does not fit into memory: torch.float16 after "
    "`import qwen2_fp16_fix; qwen2_fp16_fix.register()`, at half the size.",
    "device.no_kernels": "{device} ({name}) has compute capability {capability}, and this torch was built without "
    "kernels for it: install a build whose torch.cuda.get_arch_list() has them (those for CUDA 12.6 still had Pascal and "
    "Volta).",
    "device.mixed": "These cards want different types: a model spread over several should be in float16 with the fix.",
    # the fix
    "fix.registered": "registered and on",
    "fix.not_registered": "on; not registered in this process (ask qwen2_fp16_fix.doctor() inside your program)",
    "fix.off": "QWEN2_FP16_FIX=0 is set: the fix is switched off and every model is stock. Unset it.",
    "fix.unusable": "The fix cannot be used here: {problem}",
    "fix.untested": "transformers {version} is newer than what was tested ({supported}); its Qwen2 has the known shape.",
    "lock.none": "not pinned: no lock here",
    "lock.kept": "pinned, and nothing has changed since",
    "lock.drifted": "What runs here is not what the lock says: {first}",
    # other tools
    "tool.liger-kernel": "Once apply_liger_kernel_to_qwen2 or use_liger_kernel has replaced Qwen2's parts, the fix "
    "refuses; leave it off for Qwen2.",
    "tool.unsloth": "Importing it patches Qwen2, and the fix then refuses: use one of the two in a program.",
    "tool.peft": "Works with the fix. A layer with an adapter scales token by token; after merging, call fix(model) to "
    "plan it from its weights.",
    "tool.accelerate": "Its hooks (device_map, offloading) are kept. Layers whose weights are offloaded scale token by "
    "token.",
    "tool.vllm": "Runs a Qwen2 of its own, which this fix does not reach.",
    "tool.other": "Not known to this report.",
    "tool.replaced": "{tool} has replaced {classes} in this process, and the fix refuses to build on that: switch it off "
    "for Qwen2, or start without it.",
    # settings
    "setting.allow_fp16_bf16_reduction_math_sdp": "If on and sdpa falls back to its math kernel, scaled scores stay in "
    "float16, where they can overflow: leave it off.",
    "setting.enable_math_sdp": "Lets sdpa fall back to a kernel that computes in float32 unless the setting above is on.",
    "setting.allow_fp16_accumulation": "If on, sums inside a matmul are rounded at every step: planned layers stay "
    "finite, and results drift from float32.",
    "setting.allow_fp16_reduced_precision_reduction": "If on, parts of a split sum are rounded to float16: the proof "
    "allows for it, and it costs a little closeness.",
    "setting.allow_bf16_reduced_precision_reduction": "The same for bfloat16 models, which do not overflow.",
    "setting.set_float32_matmul_precision": "'high' and 'medium' let the float32 scores of eager be rounded on hardware that is "
    "faster so: finite, less close.",
    "setting.allow_tf32": "If on, the float32 scores of eager are rounded to 11 bits: finite, less close.",
    "setting.autocast": "A fixed model keeps its float32 parts under autocast; stock eager overflows in float16 autocast "
    "even with float32 weights.",
    "matters.finiteness": "finiteness",
    "matters.closeness": "closeness",
    "matters.stock only": "stock models only",
    "matters.no": "neither",
    # the self-test
    "self_test.runs": "self-test on {device} …",
    "self_test.passed": "Stock float16 overflows on {device} in eager and sdpa; fixed, it is finite and within a KL of "
    "{kl} of float32 (limit {limit}).",
    "self_test.not_reproduced": "{row} did not overflow on {device}, so the self-test shows nothing there.",
    "self_test.not_finite": "{row} is not finite on {device}: the fix does not work there.",
    "self_test.not_close": "{row} is at a KL of {kl} from float32 on {device}, above {limit}: only part of the fix works "
    "there.",
    "self_test.not_run": "The self-test could not run on {device} ({reason}).",
    "self_test.why": "The limit is ten times what the roundings of float16 cost this tiny model; bfloat16's cost over ten "
    "times the limit, keys that are not centred ten thousand times.",
    "self_test.skipped": "not run: this transformers is not supported",
    # the checkpoint
    "checkpoint.not_qwen2": "This checkpoint is of type {kind!r}, not 'qwen2': the fix has no part in it.",
    "checkpoint.wrapped": "A {kind} around a Qwen2: load it and call qwen2_fp16_fix.fix(model), which fixes the Qwen2 inside.",
    "checkpoint.broken": "The checkpoint cannot be read whole: {problem}",
    "checkpoint.bin": "Its weights are .bin files: convert them to safetensors, and `certify` and `verify` can read them.",
    "checkpoint.exported": "It carries the fix as remote code: load it with trust_remote_code=True, and pin its revision.",
    "checkpoint.foreign_code": "Its auto_map names code of its own ({module}): with trust_remote_code=True that is what "
    "loads, not what was examined here. It is fixed only where it keeps Qwen2's own parts; is_fixed(model) says whether.",
    "checkpoint.stock_name": "Its architectures say Qwen2ForCausalLM beside an auto_map: vLLM then runs its own Qwen2, not "
    "this code, which overflows in float16; a name of its own avoids that.",
    "checkpoint.no_auto_model": "Its auto_map has no AutoModel: vLLM's transformers backend then builds the stock model.",
    "checkpoint.proven": "Proven: with the fix, no prompt can make it overflow in float16 ({layers} layers, {scaled} of them "
    "scaled).",
    "checkpoint.not_proven": "Not provable: {reason}. `qwen2-fp16-fix certify PATH` shows every layer.",
    "checkpoint.certify": "Whether any prompt can make it overflow with the fix, `{command}` says in about {seconds} s.",
    "checkpoint.never_proven": "`certify` proves nothing about quantised weights: its kernels are not bounded.",
    "quantised.gptq": "Quantised ({method}): kernels for cards before compute capability 8.0 add up in float16 inside, "
    "where no fix of a model reaches, and are known to fail on prompts of 50 tokens or fewer; scores, norms and residual "
    "are fixed.",
    "quantised.awq": "Quantised ({method}): what its kernels add up in float16 inside is out of reach; scores, norms and "
    "residual are fixed, activations scaled token by token.",
    "quantised.bitsandbytes": "Quantised ({method}): it computes in its compute dtype; scores, norms and residual are fixed, "
    "activations scaled token by token.",
    "quantised.other": "Quantised ({method}): its kernels are called as they are; scores, norms and residual are fixed, "
    "activations scaled token by token.",
    # headings of the page
    "page.findings": "What is wrong",
    "page.warnings": "Take care",
    "page.advice": "What to do",
    "page.also": "also",
    "page.versions": "Versions",
    "page.devices": "Devices",
    "page.fix": "Fix",
    "page.lock": "Pinning",
    "page.tools": "Other tools",
    "page.no_tools": "none of Liger, Unsloth, PEFT, accelerate and vLLM",
    "page.settings": "Settings of torch, and what they bear on",
    "page.self_test": "Self-test",
    "page.checkpoint": "Checkpoint",
    "page.native": "native",
    "page.emulated": "emulated or slow",
    "page.unknown": "not known",
    "page.capability": "compute capability {capability}",
    "page.absent": "not in this torch",
    "page.imported": "imported",
    "page.passed": "passed",
    "page.failed": "FAILED",
    "page.without_effect": "Without a CUDA device these have no effect:",
    "page.size": "{parameters:,} parameters, {size}, stored as {dtypes}",
    "page.shape": "{kind}, {layers} layers, hidden size {hidden}",
}

CHINESE = {
    "verdict.well": "一切正常：在这台机器上请用 {ways} 运行 Qwen2。",
    "verdict.ill": "有问题：{first}",
    "verdict.ill_more": "有问题：{first}（下面还有 {more} 项）",
    "verdict.unsupported": "不受支持：{problem}",
    "way.bfloat16": "bfloat16",
    "way.fixed float16": "修复后的 float16",
    "way.float32": "float32",
    "reason.native_bfloat16": "{name} 原生支持 bfloat16，其数值范围与 float32 相同，不会溢出。修复使键在偏置尖峰旁保持精确。",
    "reason.cpu_bfloat16": "这颗 CPU 有 bfloat16 指令，其数值范围与 float32 相同，不会溢出。修复使键在偏置尖峰旁保持精确。",
    "reason.cpu_float16": "这颗 CPU 有 float16 指令，没有 bfloat16 指令；修复后 float16 保持有限值。",
    "reason.cpu_neither": "这颗 CPU 没有 16 位浮点指令，只能模拟：比 float32 慢，也更不精确。原版 float32 无需修复。",
    "reason.no_bfloat16": "{name}（计算能力 {capability}）没有 bfloat16：8.0 起才有，更早的卡由 torch 模拟。float16 是它快速的 16 "
    "位类型，修复后保持有限值并接近 float32。",
    "reason.slow_float16": "{name}（计算能力 {capability}）没有 bfloat16，float16 也不比 float32 快：16 "
    "位在这里只省一半显存，不省时间。修复后保持有限值。",
    "reason.old_amd": "{name} 没有 bfloat16 矩阵指令（无论 torch 怎么说）；float16 是它快速的 16 位类型，修复后保持有限值。",
    "reason.mps": "所有 Apple GPU 都原生支持 float16；bfloat16 需要 macOS 14，在 M1 和 M2 上要经由 float32。修复后的 float16 "
    "保持有限值，比 bfloat16 更接近 float32。",
    "reason.unknown_device": "不清楚 {name} 原生支持什么；只要下面的自检通过，修复后的 float16 就保持有限值。",
    "also.bfloat16_eager": '需要注意力权重：注册修复后使用 attn_implementation="eager"；原版在 bfloat16 下的分数是错的（1.5B 和 '
    "7B）。",
    "also.closest": "最接近 float32：修复后的 torch.float16，其舍入比 bfloat16 细 8 倍。",
    "also.float16_eager": '需要注意力权重：注册修复后使用 attn_implementation="eager"。',
    "also.float32_if_it_fits": "如果内存放得下 float32，torch.float32 一样快，也无需修复。",
    "also.half_the_memory": "如果内存放不下 float32：先 `import qwen2_fp16_fix; qwen2_fp16_fix.register()`，再用 "
    "torch.float16，大小减半。",
    "device.no_kernels": "{device}（{name}）的计算能力是 {capability}，而这个 torch 没有为它编译内核：请安装 "
    "torch.cuda.get_arch_list() 包含它的版本（面向 CUDA 12.6 的版本仍支持 Pascal 和 Volta）。",
    "device.mixed": "这些卡适合不同的类型：分布在多张卡上的模型请使用修复后的 float16。",
    "fix.registered": "已注册，已启用",
    "fix.not_registered": "已启用；本进程中未注册（请在自己的程序里调用 qwen2_fp16_fix.doctor()）",
    "fix.off": "设置了 QWEN2_FP16_FIX=0：修复已关闭，所有模型都是原版。请取消该变量。",
    "fix.unusable": "这里无法使用修复：{problem}",
    "fix.untested": "transformers {version} 比已测试的版本（{supported}）更新；其 Qwen2 的结构相同。",
    "lock.none": "未锁定：这里没有锁文件",
    "lock.kept": "已锁定，此后没有变化",
    "lock.drifted": "这里运行的与锁文件不符：{first}",
    "tool.liger-kernel": "一旦 apply_liger_kernel_to_qwen2 或 use_liger_kernel 替换了 Qwen2 的部件，修复会拒绝运行；请不要对 "
    "Qwen2 启用。",
    "tool.unsloth": "导入它就会改动 Qwen2，修复随后会拒绝运行：一个程序里只用其中之一。",
    "tool.peft": "可与修复同时使用。带适配器的层逐 token 缩放；合并之后请调用 fix(model)，由权重重新规划。",
    "tool.accelerate": "它的钩子（device_map、卸载）会保留。权重被卸载的层逐 token 缩放。",
    "tool.vllm": "运行自己的 Qwen2，本修复不起作用。",
    "tool.other": "本报告不了解这个工具。",
    "tool.replaced": "{tool} 在本进程中替换了 {classes}，修复拒绝在此之上运行：请不要对 Qwen2 启用它，或者启动时不加载它。",
    "setting.allow_fp16_bf16_reduction_math_sdp": "若开启且 sdpa 退回到 math 内核，缩放后的分数仍是 float16，可能溢出：请保持关闭。",
    "setting.enable_math_sdp": "允许 sdpa 退回到 math 内核；只要上一项关闭，它就以 float32 计算。",
    "setting.allow_fp16_accumulation": "若开启，矩阵乘法内部每一步都舍入：已规划的层仍为有限值，但结果会偏离 float32。",
    "setting.allow_fp16_reduced_precision_reduction": "若开启，拆分的部分和会舍入到 float16：证明已考虑这一点，精度略有损失。",
    "setting.allow_bf16_reduced_precision_reduction": "同上，针对不会溢出的 bfloat16 模型。",
    "setting.set_float32_matmul_precision": "'high' 和 'medium' 允许在更快的硬件上舍入 eager 的 float32 分数：仍为有限值，但不够接近。",
    "setting.allow_tf32": "若开启，eager 的 float32 分数会舍入到 11 位：仍为有限值，但不够接近。",
    "setting.autocast": "修复后的模型在 autocast 下保留 float32 部分；原版 eager 在 float16 autocast 下即使权重是 float32 也会溢出。",
    "matters.finiteness": "影响是否有限",
    "matters.closeness": "影响接近程度",
    "matters.stock only": "仅影响原版模型",
    "matters.no": "都不影响",
    "self_test.runs": "在 {device} 上自检 …",
    "self_test.passed": "原版 float16 在 {device} 上的 eager 和 sdpa 都会溢出；修复后为有限值，与 float32 的 KL 不超过 "
    "{kl}（上限 {limit}）。",
    "self_test.not_reproduced": "{row} 在 {device} 上没有溢出，自检在那里说明不了问题。",
    "self_test.not_finite": "{row} 在 {device} 上不是有限值：修复在那里不起作用。",
    "self_test.not_close": "{row} 在 {device} 上与 float32 的 KL 为 {kl}，超过 {limit}：修复在那里只有一部分起作用。",
    "self_test.not_run": "无法在 {device} 上运行自检（{reason}）。",
    "self_test.why": "上限是 float16 舍入给这个小模型带来的误差的十倍；bfloat16 的误差超过上限十倍以上，未中心化的键超过一万倍。",
    "self_test.skipped": "未运行：不支持这个 transformers 版本",
    "checkpoint.not_qwen2": "这个检查点的类型是 {kind!r}，不是 'qwen2'：修复与它无关。",
    "checkpoint.wrapped": "{kind} 中包含一个 Qwen2：加载之后调用 qwen2_fp16_fix.fix(model)，即可修复其中的 Qwen2。",
    "checkpoint.broken": "检查点无法完整读取：{problem}",
    "checkpoint.bin": "权重是 .bin 文件：转换为 safetensors 后才能用 `certify` 和 `verify` 读取。",
    "checkpoint.exported": "它以远程代码的形式自带修复：请用 trust_remote_code=True 加载，并锁定其 revision。",
    "checkpoint.foreign_code": "它的 auto_map 指向自己的代码（{module}）：使用 trust_remote_code=True 时加载的是那份代码，而不是这里检查的模型。"
    "只有保留 Qwen2 自身部件时它才会被修复；is_fixed(model) 会给出答案。",
    "checkpoint.stock_name": "它有 auto_map，而 architectures 写的是 Qwen2ForCausalLM：vLLM 会运行自己的 Qwen2 "
    "而不是这份代码，在 float16 下溢出；换一个名字即可避免。",
    "checkpoint.no_auto_model": "它的 auto_map 没有 AutoModel：vLLM 的 transformers 后端会构建原版模型。",
    "checkpoint.proven": "已证明：修复之后，没有任何提示词能使它在 float16 下溢出（共 {layers} 层，其中 {scaled} 层有缩放）。",
    "checkpoint.not_proven": "无法证明：{reason}。`qwen2-fp16-fix certify PATH` 会列出每一层。",
    "checkpoint.certify": "修复之后是否有提示词能使它溢出，`{command}` 约 {seconds} 秒给出答案。",
    "checkpoint.never_proven": "`certify` 无法证明量化权重：其内核没有上界。",
    "quantised.gptq": "已量化（{method}）：计算能力 8.0 之前的卡所用的内核在内部以 float16 累加，对模型的任何修复都够不到，已知在不超过 50 "
    "个 token 的提示词上失败；分数、归一化和残差已修复。",
    "quantised.awq": "已量化（{method}）：其内核内部的 float16 累加够不到；分数、归一化和残差已修复，激活逐 token 缩放。",
    "quantised.bitsandbytes": "已量化（{method}）：以其计算类型计算；分数、归一化和残差已修复，激活逐 token 缩放。",
    "quantised.other": "已量化（{method}）：其内核按原样调用；分数、归一化和残差已修复，激活逐 token 缩放。",
    "page.findings": "问题",
    "page.warnings": "请注意",
    "page.advice": "怎么做",
    "page.also": "另外",
    "page.versions": "版本",
    "page.devices": "设备",
    "page.fix": "修复",
    "page.lock": "锁定",
    "page.tools": "其他工具",
    "page.no_tools": "没有 Liger、Unsloth、PEFT、accelerate 和 vLLM",
    "page.settings": "torch 的设置及其影响",
    "page.self_test": "自检",
    "page.checkpoint": "检查点",
    "page.native": "原生",
    "page.emulated": "模拟或较慢",
    "page.unknown": "未知",
    "page.capability": "计算能力 {capability}",
    "page.absent": "此版本的 torch 没有",
    "page.imported": "已导入",
    "page.passed": "通过",
    "page.failed": "失败",
    "page.without_effect": "没有 CUDA 设备，以下设置不起作用：",
    "page.size": "{parameters:,} 个参数，{size}，存储为 {dtypes}",
    "page.shape": "{kind}，{layers} 层，隐藏维度 {hidden}",
}

TEXTS: dict[str, dict[str, str]] = {"en": ENGLISH, "zh": CHINESE}
