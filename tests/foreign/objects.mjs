// The objects cache: filled at the start, kept up to date by events, waited for by barriers.
import { rejection, run } from './client.mjs'

await run(async (xapi, { sr }) => {
  const types = {}
  for (const { $type } of Object.values(xapi.objects.all)) {
    types[$type] = (types[$type] ?? 0) + 1
  }
  const added = []
  xapi.objects.on('add', objects => added.push(...Object.values(objects).map(object => object.$type)))

  const ref = await xapi.call('VDI.create', {
    name_label: 'from xen-api',
    name_description: '',
    SR: sr,
    virtual_size: 4 * 1024 * 1024,
    type: 'user',
    sharable: false,
    read_only: false,
    other_config: { 'xo:test': 'yes' },
    sm_config: {},
    tags: ['one'],
  })
  const created = await xapi.barrier(ref)
  await created.set_name_label('renamed & <odd> \u00e9\u{1f4be}')
  await created.update_other_config({ 'xo:import:task': 'OpaqueRef:x', empty: '' })
  await created.add_tags('two')
  const changed = await xapi.barrier(ref)
  const fetched = await xapi.getRecordByUuid('VDI', changed.uuid)
  const size = await xapi.getField('VDI', ref, 'virtual_size')
  const name = created.$SR.name_label

  await changed.update_other_config('xo:import:task', null)
  const removed = (await xapi.barrier(ref)).other_config
  await changed.$call('destroy')
  await xapi.barrier()
  const afterwards = xapi.getObjectByRef(ref, null)

  return {
    types,
    added,
    created,
    changed,
    fetched,
    removed,
    afterwards,
    size,
    repository: name,
    pool: xapi.pool,
    unknown: await rejection(xapi.getRecord('VDI', ref)),
    method: await rejection(xapi.call('VDI.levitate', ref)),
    type: await rejection(xapi.call('VDI.create', { SR: 12 })),
    barriers: Object.keys(xapi.pool.other_config).filter(key => key.startsWith('xo:barrier:')).length,
  }
})
